import { spawn, type ChildProcess } from 'node:child_process'
import { closeSync, mkdirSync, openSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { agentApi, ApiClient, pluginApi, type AgentStatus, type Checkpoint, type PluginStatus, type RecoveryPoint, type VpgStatus } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import { projectDir } from './project.ts'
import { agentConfig, pluginConfig, type SiteConfig } from './site-config.ts'

/** A daemon of the lab, as systemd would run it: started, stopped, killed, started again with the same files. */
export class LabDaemon {
  readonly name: 'agent' | 'plugin'
  readonly rootDir: string
  readonly api: ApiClient
  readonly logPath: string
  readonly #configPath: string
  readonly #nodeArgs: readonly string[]
  #child: ChildProcess | undefined

  /** @param nodeArgs for node, before the program: --inspect and the like */
  constructor(name: 'agent' | 'plugin', rootDir: string, config: SiteConfig, nodeArgs: readonly string[] = []) {
    this.name = name
    this.#nodeArgs = nodeArgs
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

  /** Starts it and waits until it answers. */
  async start(): Promise<void> {
    const log = openSync(this.logPath, 'a')
    const child = spawn(process.execPath, [...this.#nodeArgs, join(projectDir(), 'dist', this.name, 'main.js'), '--config', this.#configPath], { stdio: ['ignore', log, log] })
    closeSync(log)
    this.#child = child
    const deadlineMs = performance.now() + 20_000
    while (true) {
      if (this.pid === undefined) throw new CdpError('CLOSED', `${this.name} ended at once: ${readFileSync(this.logPath, 'utf8').slice(-2000)}`)
      try {
        await this.api.call(this.name === 'agent' ? agentApi.status : pluginApi.status, {})
        return
      } catch (error) {
        if (performance.now() > deadlineMs) throw error
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

  async #end(signal: NodeJS.Signals): Promise<void> {
    if (this.pid === undefined) return
    this.#child?.kill(signal)
    if (!(await this.ended(15_000))) {
      this.#child?.kill('SIGKILL')
      await this.ended(5_000)
    }
  }
}

export type SitesOptions = { rootDir: string; plugin?: SiteConfig; agent?: SiteConfig; pluginNodeArgs?: readonly string[] }

/** Both sites on one machine, below one root directory, paired. */
export class Sites {
  readonly rootDir: string
  readonly agent: LabDaemon
  readonly plugin: LabDaemon

  private constructor(rootDir: string, agent: SiteConfig, plugin: SiteConfig, pluginNodeArgs: readonly string[]) {
    this.rootDir = rootDir
    this.agent = new LabDaemon('agent', rootDir, agent)
    this.plugin = new LabDaemon('plugin', rootDir, plugin, pluginNodeArgs)
  }

  /** Starts both daemons and pairs them. The root directory is laid out as a Proxmox node already. */
  static async start({ rootDir, plugin = {}, agent = {}, pluginNodeArgs = [] }: SitesOptions): Promise<Sites> {
    const sites = new Sites(
      rootDir,
      { ...agentConfig(rootDir), ...agent },
      { ...pluginConfig(rootDir), ...plugin },
      pluginNodeArgs,
    )
    mkdirSync(join(rootDir, 'etc/pve'), { recursive: true })
    await Promise.all([sites.agent.start(), sites.plugin.start()])
    return sites
  }

  async pair(): Promise<void> {
    const { token } = await this.agent.api.call(agentApi.createPairingToken, { body: { host: '127.0.0.1' } })
    await this.plugin.api.call(pluginApi.pair, { body: { token } })
  }

  createVpg(name: string, vmIds: number[], checkpointEveryMs = 1000): Promise<VpgStatus> {
    return this.plugin.api.call(pluginApi.createVpg, { body: { name, vmIds, checkpointEveryMs } })
  }

  pluginStatus(): Promise<PluginStatus> {
    return this.plugin.api.call(pluginApi.status, {})
  }

  agentStatus(): Promise<AgentStatus> {
    return this.agent.api.call(agentApi.status, {})
  }

  /** Waits until a group is protected: all VMs streaming, and a valid checkpoint. */
  async untilProtected(vpg: string, deadlineMs = 60_000): Promise<VpgStatus> {
    return until(`${vpg} is protected`, deadlineMs, async () => {
      const status = (await this.pluginStatus()).vpgs.find(({ name }) => name === vpg)
      return status?.state === 'protected' ? status : undefined
    }, async () => JSON.stringify(await this.pluginStatus().catch(String)) + this.plugin.log().slice(-1500))
  }

  async checkpoints(vpg: string, limit = 1000): Promise<Checkpoint[]> {
    return (await this.agent.api.call(agentApi.listCheckpoints, { params: { name: vpg }, query: { limit } })).checkpoints
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
