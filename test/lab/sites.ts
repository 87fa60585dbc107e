import { spawn, type ChildProcess } from 'node:child_process'
import { closeSync, mkdirSync, openSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { agentApi, ApiClient, pluginApi, type AgentStatus, type Checkpoint, type PluginStatus, type RecoveryPoint, type VpgStatus } from '../../core/api/index.ts'
import { CdpError, errorCode } from '../../core/errors/index.ts'
import type { Link, NetworkPlace } from './link.ts'
import { projectDir } from './project.ts'
import { agentConfig, pluginConfig, type SiteConfig } from './site-config.ts'

export type LabDaemonOptions = {
  /** For node, before the program: --inspect and the like. */
  nodeArgs?: readonly string[]
  /** The network that it runs in; by default this machine's. */
  place?: NetworkPlace
  /** Started again when it ends by itself, or somebody else ends it: a busy machine makes the watchdog do so. */
  respawns?: boolean
}

const START_DEADLINE_MS = 90_000
const RESPAWN_MS = 100

/** A daemon of the lab, as systemd would run it: started, stopped, killed, started again with the same files. */
export class LabDaemon {
  readonly name: 'agent' | 'plugin'
  readonly rootDir: string
  readonly api: ApiClient
  readonly logPath: string
  readonly #configPath: string
  readonly #nodeArgs: readonly string[]
  /** What stands before its program. */
  readonly place: NetworkPlace
  readonly #respawns: boolean
  #child: ChildProcess | undefined
  #wanted = false

  constructor(name: 'agent' | 'plugin', rootDir: string, config: SiteConfig, { nodeArgs = [], place = [], respawns = false }: LabDaemonOptions = {}) {
    this.name = name
    this.#nodeArgs = nodeArgs
    this.place = place
    this.#respawns = respawns
    this.rootDir = rootDir
    mkdirSync(join(rootDir, 'lab'), { recursive: true })
    this.#configPath = join(rootDir, 'lab', `${name}.json`)
    this.logPath = join(rootDir, 'lab', `${name}.log`)
    this.api = new ApiClient({ socketPath: String(config.apiSocket), daemon: `the ${name}`, unit: `pve-cdp-${name}` })
    writeFileSync(this.#configPath, JSON.stringify(config, undefined, 2))
  }

  get pid(): number | undefined {
    return this.#child?.exitCode === null && this.#child.signalCode === null ? this.#child.pid : undefined
  }

  /** Starts it, unless it runs, and waits until it answers. */
  async start(): Promise<void> {
    this.#wanted = true
    this.#spawn()
    const deadlineMs = performance.now() + START_DEADLINE_MS
    while (true) {
      if (this.pid === undefined && !this.#respawns) throw new CdpError('CLOSED', `${this.name} ended at once: ${readFileSync(this.logPath, 'utf8').slice(-2000)}`)
      try {
        await this.api.call(this.name === 'agent' ? agentApi.status : pluginApi.status, {})
        return
      } catch (error) {
        if (performance.now() > deadlineMs) throw error
        await delay(50)
      }
    }
  }

  /** The answer to a question; if it is just being started again, to the same question a moment later. */
  async answers<T>(ask: () => Promise<T>): Promise<T> {
    const deadlineMs = performance.now() + START_DEADLINE_MS
    while (true) {
      try {
        return await ask()
      } catch (error) {
        const isAway = errorCode(error) === 'UNREACHABLE' || errorCode(error) === 'CLOSED'
        if (!this.#respawns || !this.#wanted || !isAway || performance.now() > deadlineMs) throw error
        await delay(50)
      }
    }
  }

  /** Stops it as systemd does. */
  async stop(): Promise<void> {
    await this.#end('SIGTERM')
  }

  async kill(): Promise<void> {
    await this.#end('SIGKILL')
  }

  /** Sends a signal and waits for nothing (SIGSTOP, SIGCONT). */
  signal(signal: NodeJS.Signals): void {
    this.#child?.kill(signal)
  }

  /** Resolves when the process has ended by itself or by somebody else. */
  async ended(deadlineMs: number): Promise<boolean> {
    const child = this.#child
    if (child === undefined || this.pid === undefined) return true
    const { promise, resolve } = Promise.withResolvers<boolean>()
    const timer = setTimeout(() => resolve(false), deadlineMs)
    child.once('exit', () => resolve(true))
    return promise.finally(() => clearTimeout(timer))
  }

  log(): string {
    return readFileSync(this.logPath, 'utf8')
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.signal('SIGCONT')
    await this.stop()
  }

  #spawn(): void {
    if (!this.#wanted || this.pid !== undefined) return
    const log = openSync(this.logPath, 'a')
    const [command, ...args] = [...this.place, process.execPath, ...this.#nodeArgs, join(projectDir(), 'dist', this.name, 'main.js'), '--config', this.#configPath]
    const child = spawn(command, args, { stdio: ['ignore', log, log] })
    closeSync(log)
    this.#child = child
    if (this.#respawns) child.once('exit', () => setTimeout(() => this.#spawn(), RESPAWN_MS))
  }

  async #end(signal: NodeJS.Signals): Promise<void> {
    this.#wanted = false
    if (this.pid === undefined) return
    this.#child?.kill(signal)
    if (!(await this.ended(15_000))) {
      this.#child?.kill('SIGKILL')
      await this.ended(5_000)
    }
  }
}

export type SitesOptions = { rootDir: string; plugin?: SiteConfig; agent?: SiteConfig; pluginNodeArgs?: readonly string[]; /** The line between them; by default loopback. */ link?: Link; /** As a service manager would: both are started again when they end unasked, and the plugin goes before what else the machine does. */ respawns?: boolean }

/** Both sites on one machine, below one root directory, paired. */
export class Sites {
  readonly rootDir: string
  readonly agent: LabDaemon
  readonly plugin: LabDaemon

  readonly #agentHost: string

  private constructor(rootDir: string, agent: SiteConfig, plugin: SiteConfig, { pluginNodeArgs = [], link, respawns = false }: SitesOptions) {
    this.rootDir = rootDir
    this.agent = new LabDaemon('agent', rootDir, agent, { place: link?.recoverySite, respawns })
    this.plugin = new LabDaemon('plugin', rootDir, plugin, { nodeArgs: pluginNodeArgs, place: [...(respawns ? ['nice', '-n', '-10'] : []), ...(link?.protectedSite ?? [])], respawns })
    this.#agentHost = link?.recoveryHost ?? '127.0.0.1'
  }

  /** Starts both daemons and pairs them. The root directory is laid out as a Proxmox node already. */
  static async start(options: SitesOptions): Promise<Sites> {
    const { rootDir, plugin = {}, agent = {}, link } = options
    const sites = new Sites(
      rootDir,
      { ...agentConfig(rootDir), ...(link === undefined ? {} : { listen: { host: link.recoveryHost, port: 8765 } }), ...agent },
      { ...pluginConfig(rootDir), ...plugin },
      options,
    )
    mkdirSync(join(rootDir, 'etc/pve'), { recursive: true })
    try {
      await Promise.all([sites.agent.start(), sites.plugin.start()])
      return sites
    } catch (error) {
      await sites[Symbol.asyncDispose]()
      throw error
    }
  }

  async pair(): Promise<void> {
    const { token } = await this.agent.api.call(agentApi.createPairingToken, { body: { host: this.#agentHost } })
    await this.plugin.answers(() => this.plugin.api.call(pluginApi.pair, { body: { token } }))
  }

  createVpg(name: string, vmIds: number[], checkpointEveryMs = 1000): Promise<VpgStatus> {
    return this.plugin.api.call(pluginApi.createVpg, { body: { name, vmIds, checkpointEveryMs } })
  }

  pluginStatus(): Promise<PluginStatus> {
    return this.plugin.answers(() => this.plugin.api.call(pluginApi.status, {}))
  }

  agentStatus(): Promise<AgentStatus> {
    return this.agent.answers(() => this.agent.api.call(agentApi.status, {}))
  }

  /** Waits until a group is protected: all VMs streaming, and a valid checkpoint. */
  async untilProtected(vpg: string, deadlineMs = 60_000): Promise<VpgStatus> {
    return until(`${vpg} is protected`, deadlineMs, async () => {
      const status = (await this.pluginStatus()).vpgs.find(({ name }) => name === vpg)
      return status?.state === 'protected' ? status : undefined
    }, async () => JSON.stringify(await this.pluginStatus().catch(String)) + this.plugin.log().slice(-1500))
  }

  async checkpoints(vpg: string, limit = 1000): Promise<Checkpoint[]> {
    return (await this.agent.answers(() => this.agent.api.call(agentApi.listCheckpoints, { params: { name: vpg }, query: { limit } }))).checkpoints
  }

  openPoint(vpg: string, checkpoint: string | { atUnixMs: number }): Promise<RecoveryPoint> {
    return this.agent.api.call(agentApi.openPoint, { body: { vpg, checkpoint } })
  }

  async closePoint(pointId: string): Promise<void> {
    await this.agent.api.call(agentApi.closePoint, { params: { id: pointId } })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.plugin[Symbol.asyncDispose]()
    await this.agent[Symbol.asyncDispose]()
  }
}

/** Asks again every 50 ms until there is an answer. @throws CdpError TIMEOUT with what was there instead */
export const until = async <T>(what: string, deadlineMs: number, ask: () => Promise<T | undefined>, describe?: () => Promise<string>): Promise<T> => {
  const endMs = performance.now() + deadlineMs
  while (true) {
    const answer = await ask()
    if (answer !== undefined) return answer
    if (performance.now() > endMs) throw new CdpError('TIMEOUT', `not within ${deadlineMs} ms: ${what}${describe === undefined ? '' : `; instead: ${await describe()}`}`)
    await delay(50)
  }
}
