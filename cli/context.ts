import { ApiClient } from '../core/api/index.ts'
import { CdpError, errorCode } from '../core/errors/index.ts'
import { painter } from './format/table.ts'
import type { Painter } from './format/table.ts'
import type { CliIo } from './io.ts'

export type Side = 'plugin' | 'agent'
export const sides: readonly Side[] = ['plugin', 'agent']

export type GlobalOptions = { json?: boolean; pluginSocket?: string; agentSocket?: string }

/** What a command works with: the two daemons, and where its answer goes. */
export type Context = {
  io: CliIo
  json: boolean
  paint: Painter
  client: (side: Side) => ApiClient
  socketPath: (side: Side) => string
  /** The result of a command: with --json the value, else the text for people. */
  print: (value: unknown, text: () => string) => void
}

const defaults: Record<Side, { socketPath: string; variable: string; unit: string }> = {
  plugin: { socketPath: '/run/pve-cdp/plugin.sock', variable: 'PVECDP_PLUGIN_SOCKET', unit: 'pve-cdp-plugin' },
  agent: { socketPath: '/run/pve-cdp/agent.sock', variable: 'PVECDP_AGENT_SOCKET', unit: 'pve-cdp-agent' },
}

export const createContext = (io: CliIo, options: GlobalOptions): Context => {
  const socketPath = (side: Side): string =>
    (side === 'plugin' ? options.pluginSocket : options.agentSocket) ?? (io.env[defaults[side].variable] || defaults[side].socketPath)
  const json = options.json === true
  return {
    io,
    json,
    paint: painter(io.color && !json),
    socketPath,
    client: (side) => new ApiClient({ socketPath: socketPath(side), daemon: `the ${side}`, unit: defaults[side].unit }),
    print: (value, text) => void io.stdout.write(json ? `${JSON.stringify(value)}\n` : text()),
  }
}

/** True when a daemon has no socket at all: it is not installed on this machine, and nothing is wrong with that. */
export const isAbsent = (error: unknown): boolean => error instanceof CdpError && error.code === 'UNREACHABLE' && errorCode(error.cause) === 'ENOENT'

/** Asks every daemon on this machine. Throws UNREACHABLE when there is none, or the error when no one answered. */
export const askBoth = async <T>(
  context: Context,
  which: readonly Side[],
  ask: (side: Side, client: ApiClient) => Promise<T>,
): Promise<{ answers: Map<Side, T>; failures: Map<Side, CdpError> }> => {
  const outcomes = await Promise.allSettled(which.map((side) => ask(side, context.client(side))))
  const answers = new Map<Side, T>()
  const failures = new Map<Side, CdpError>()
  which.forEach((side, index) => {
    const outcome = outcomes[index]
    if (outcome?.status === 'fulfilled') answers.set(side, outcome.value)
    else if (outcome !== undefined)
      failures.set(side, outcome.reason instanceof CdpError ? outcome.reason : new CdpError('INTERNAL', String(outcome.reason), { cause: outcome.reason }))
  })
  if (answers.size > 0) {
    for (const side of which) if (isAbsent(failures.get(side))) failures.delete(side)
    return { answers, failures }
  }
  const telling = [...failures.values()].find((failure) => !isAbsent(failure)) ?? [...failures.values()][0]
  if (which.length === 1 || (telling !== undefined && !isAbsent(telling))) throw telling
  throw new CdpError('UNREACHABLE', 'neither the plugin nor the agent runs on this machine', {
    hint: `Start one (systemctl start ${defaults.plugin.unit} or ${defaults.agent.unit}), or name its socket with --plugin-socket or --agent-socket.`,
    context: { socketPath: which.map((side) => context.socketPath(side)).join(', ') },
  })
}
