import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, mkdirSync, openSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { agentApi, ApiClient, type AgentStatus, type RecoveryPoint } from '../../core/api/index.ts'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { joinSite, type Pairing } from '../../plugin/pairing/index.ts'
import { projectDir } from '../../test/lab/project.ts'
import { cpuSecondsOf } from './proc.ts'

/** The protected site's id in all benches. */
export const SITE = '00000000-0000-4000-8000-00000000be4c'
const START_DEADLINE_MS = 60_000
const IDLE_WINDOW_MS = 200
const IDLE_SHARE = 0.1

export type AgentSideOptions = {
  /** For sockets: short. */
  socketDirectory: string
  /** For journals and mirrors: on a real disk. */
  diskDirectory: string
  /** Arguments of node itself, for profiles. */
  nodeArgs?: readonly string[]
}

/** The agent as it is shipped, a process of its own, with the protected site paired through its API. Dies with this process. */
export class AgentSide implements AsyncDisposable {
  readonly api: ApiClient
  readonly pairing: Pairing
  readonly #child: ChildProcess
  readonly #stateDirectory: string

  private constructor(child: ChildProcess, api: ApiClient, pairing: Pairing, stateDirectory: string) {
    this.#child = child
    this.api = api
    this.pairing = pairing
    this.#stateDirectory = stateDirectory
  }

  static async start({ socketDirectory, diskDirectory, nodeArgs = [] }: AgentSideOptions): Promise<AgentSide> {
    const stateDirectory = join(diskDirectory, 'agent')
    const paths = { config: join(diskDirectory, 'agent.json'), log: join(diskDirectory, 'agent.log') }
    const config = {
      stateDirectory, runDirectory: socketDirectory, apiSocket: join(socketDirectory, 'agent.sock'), pointSocket: join(socketDirectory, 'points.sock'), listen: { host: '127.0.0.1', port: 0 },
    }
    mkdirSync(diskDirectory, { recursive: true })
    writeFileSync(paths.config, JSON.stringify(config))
    const log = openSync(paths.log, 'a')
    const child = spawn('setpriv', ['--pdeathsig', 'KILL', '--', process.execPath, ...nodeArgs, join(projectDir(), 'dist/agent/main.js'), '--config', paths.config], { stdio: ['ignore', log, log] })
    closeSync(log)
    const api = new ApiClient({ socketPath: config.apiSocket, daemon: 'the agent', unit: 'pve-cdp-agent' })
    try {
      await untilAnswering(child, api)
      const { token } = await api.call(agentApi.createPairingToken, { body: { host: '127.0.0.1' } })
      return new AgentSide(child, api, await joinSite({ token, siteId: SITE, directory: join(diskDirectory, 'pairing') }), stateDirectory)
    } catch (error) {
      await end(child, 'SIGKILL')
      const log = readFileSync(paths.log, 'utf8').slice(-2000)
      throw new CdpError('CLOSED', `the agent does not serve: ${errorMessage(error)}${log === '' ? '' : `; its log: ${log}`}`, { cause: error })
    }
  }

  get pid(): number {
    return this.#child.pid ?? 0
  }

  vmDirectory(vm: string): string {
    return join(this.#stateDirectory, 'vms', SITE, vm)
  }

  status(): Promise<AgentStatus> {
    return this.api.call(agentApi.status, {})
  }

  /** Resolves with the time once everything up to `seq` of a VM is durable. @throws CdpError TIMEOUT */
  async untilDurable(vm: string, seq: number, deadlineMs = 120_000): Promise<number> {
    const untilMs = performance.now() + deadlineMs
    while (true) {
      const durableSeq = (await this.status()).vpgs.flatMap(({ vms }) => vms).find(({ vmId }) => vmId === Number(vm))?.durableSeq ?? 0
      if (durableSeq >= seq) return Date.now()
      if (performance.now() > untilMs) throw new CdpError('TIMEOUT', `the agent is at ${durableSeq} of ${seq} after ${deadlineMs} ms`)
      await delay(10)
    }
  }

  /** Waits until background work (sealing, merging) is over: it belongs to our round, not to the next one's. Returns how long that took. */
  async untilIdle(deadlineMs = 30_000): Promise<number> {
    const startedMs = performance.now()
    for (let before = cpuSecondsOf(this.pid); performance.now() - startedMs < deadlineMs; ) {
      await delay(IDLE_WINDOW_MS)
      const now = cpuSecondsOf(this.pid)
      if ((now - before) * 1000 < IDLE_WINDOW_MS * IDLE_SHARE) break
      before = now
    }
    return Math.max(0, performance.now() - startedMs - IDLE_WINDOW_MS)
  }

  openPoint(vpg: string, checkpoint: string): Promise<RecoveryPoint> {
    return this.api.call(agentApi.openPoint, { body: { vpg, checkpoint } })
  }

  async closePoint(pointId: string): Promise<void> {
    await this.api.call(agentApi.closePoint, { params: { id: pointId } })
  }

  /** SIGSTOP, SIGCONT. */
  signal(signal: NodeJS.Signals): void {
    this.#child.kill(signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.signal('SIGCONT')
    await end(this.#child, 'SIGTERM')
  }
}

const untilAnswering = async (child: ChildProcess, api: ApiClient): Promise<void> => {
  const untilMs = performance.now() + START_DEADLINE_MS
  while (true) {
    if (child.exitCode !== null) throw new CdpError('CLOSED', 'it ended at once')
    try {
      return void (await api.call(agentApi.status, {}))
    } catch (error) {
      if (performance.now() > untilMs) throw error
      await delay(20)
    }
  }
}

/** Ends a child, by force if it does not listen for 15 s. */
const end = async (child: ChildProcess, signal: NodeJS.Signals): Promise<void> => {
  if (child.exitCode !== null || child.signalCode !== null) return
  const ended = once(child, 'exit')
  child.kill(signal)
  const timer = setTimeout(() => child.kill('SIGKILL'), 15_000)
  await ended
  clearTimeout(timer)
}
