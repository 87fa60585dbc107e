import { open, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { AgentSide } from './agent-side.ts'
import { fio, type FioResult, type Load } from './fio.ts'
import { Nbdkit } from './nbdkit.ts'
import { PluginSide } from './plugin-side.ts'
import { cpuSecondsOf } from './proc.ts'
import { SourceDisk } from './source-disk.ts'
import { makeTlsCertificates } from './tls-certificates.ts'

/** What a round of load took, on our path or on the reference's. */
export type PathRound = {
  fio: FioResult
  /** From the last answer to the guest until everything is durable at the agent. */
  drainMs: number
  /** Then, until the agent's background work was over. */
  settleMs: number
  cpu: { pluginSeconds: number; agentSeconds: number }
  letGo: boolean
  peakBytes: number
}

export type ReferenceRound = { fio: FioResult; nbdkitSeconds: number }

export type PathRigOptions = { socketDirectory: string; diskDirectory: string; sizeBytes: number; signal: AbortSignal; nodeArgs?: readonly string[] }

/** One source disk and both ways out of it: our plugin and agent, and QEMU's own mirror over TLS into nbdkit; both end on the same disk. */
export class PathRig implements AsyncDisposable {
  readonly source: SourceDisk
  readonly agent: AgentSide
  readonly plugin: PluginSide
  readonly nbdkit: Nbdkit
  readonly #options: PathRigOptions
  readonly #tlsDirectory: string
  readonly #copyPath: string
  readonly #stack: AsyncDisposableStack

  private constructor(options: PathRigOptions, parts: { source: SourceDisk; agent: AgentSide; plugin: PluginSide; nbdkit: Nbdkit; tlsDirectory: string; copyPath: string }, stack: AsyncDisposableStack) {
    this.#options = options
    this.source = parts.source
    this.agent = parts.agent
    this.plugin = parts.plugin
    this.nbdkit = parts.nbdkit
    this.#tlsDirectory = parts.tlsDirectory
    this.#copyPath = parts.copyPath
    this.#stack = stack
  }

  static async start(options: PathRigOptions): Promise<PathRig> {
    const { socketDirectory, diskDirectory, sizeBytes, nodeArgs } = options
    await using stack = new AsyncDisposableStack()
    stack.defer(() => rm(join(diskDirectory, 'path'), { recursive: true, force: true }))
    const source = stack.use(await SourceDisk.start(socketDirectory, 'path', sizeBytes))
    const agent = stack.use(await AgentSide.start({ socketDirectory, diskDirectory: join(diskDirectory, 'path'), nodeArgs }))
    const plugin = stack.use(await PluginSide.start(nodeArgs))
    const tlsDirectory = await makeTlsCertificates(join(diskDirectory, 'path/tls'))
    const copyPath = join(diskDirectory, 'path/copy.raw')
    const copy = await open(copyPath, 'w')
    await copy.truncate(sizeBytes)
    await copy.close()
    const nbdkit = stack.use(await Nbdkit.startTls(tlsDirectory, 'file', copyPath))
    return new PathRig(options, { source, agent, plugin, nbdkit, tlsDirectory, copyPath }, stack.move())
  }

  /** A capture worker of the source disk, as VM `vm`, which is journaled from here on. */
  async capture(vm: string, budgetBytes: number): Promise<void> {
    await this.plugin.capture({ vm, targetPath: this.#targetPath(vm), sizeBytes: this.#options.sizeBytes, budgetBytes, pairing: this.agent.pairing })
  }

  /** Runs `work` while every write to the source disk is captured for VM `vm`. */
  captured<T>(vm: string, work: () => Promise<T>): Promise<T> {
    return this.source.mirrored({ socketPath: this.#targetPath(vm), exportName: 'scsi0' }, work)
  }

  load(load: Load): Promise<FioResult> {
    return fio(this.source.uri, load, { signal: this.#options.signal, directory: this.#options.socketDirectory })
  }

  /** A round on our path. If capture lets go, nothing of it says anything but that. */
  async ours(vm: string, load: Load): Promise<PathRound> {
    const before = this.#cpu()
    const round = await this.captured(vm, async () => {
      const result = await this.load(load)
      const letGo = this.plugin.news(vm).letGo.length > 0
      const { seq } = await this.plugin.ask(vm, 'captured', {})
      const drainMs = letGo ? 0 : Math.max(0, (await this.agent.untilDurable(vm, seq)) - result.endedAtUnixMs)
      return { fio: result, drainMs, letGo: letGo || this.plugin.news(vm).letGo.length > 0 }
    })
    const settleMs = await this.agent.untilIdle()
    const after = this.#cpu()
    return {
      ...round, settleMs, peakBytes: this.plugin.news(vm).peakBytes,
      cpu: { pluginSeconds: after.pluginSeconds - before.pluginSeconds, agentSeconds: after.agentSeconds - before.agentSeconds },
    }
  }

  /** A round of QEMU's own mirror over TLS into nbdkit. What it left in the page cache is written before this returns, outside of what is measured. */
  async reference(load: Load): Promise<ReferenceRound> {
    const before = cpuSecondsOf(this.nbdkit.pid)
    const result = await this.source.mirrored({ host: '127.0.0.1', port: this.nbdkit.port, exportName: '', tlsDirectory: this.#tlsDirectory }, () => this.load(load))
    const nbdkitSeconds = cpuSecondsOf(this.nbdkit.pid) - before
    await using copy = await open(this.#copyPath, 'r+')
    await copy.datasync()
    return { fio: result, nbdkitSeconds }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack.disposeAsync()
  }

  #targetPath(vm: string): string {
    return join(this.#options.socketDirectory, `${vm}.sock`)
  }

  #cpu(): PathRound['cpu'] {
    return { pluginSeconds: cpuSecondsOf(this.plugin.pid), agentSeconds: cpuSecondsOf(this.agent.pid) }
  }
}
