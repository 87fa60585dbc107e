import { spawn } from 'node:child_process'
import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, mkdtemp, rm, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { Catalogue } from '../../agent/checkpoint/index.ts'
import { HashDesk } from '../../agent/hashes/index.ts'
import { GroupGenerations, Ingest, VmRegistry } from '../../agent/ingest/index.ts'
import { SegmentSealer } from '../../agent/journal/index.ts'
import type { VmStore } from '../../agent/journal/index.ts'
import { PinRegistry, PointServer } from '../../agent/recovery/index.ts'
import { listenSecure } from '../../core/link/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { createAuthority, createKeyPair, issueCertificate } from '../../core/pki/index.ts'
import type { Authority, TlsIdentity } from '../../core/pki/index.ts'
import type { CheckpointMark } from '../../core/record/index.ts'
import { asList, asObject, listField, optionalField, stringField } from '../../core/qmp/index.ts'
import { GroupClock } from '../../plugin/capture/index.ts'
import type { ProtectSettings } from '../../plugin/protect/index.ts'
import { GroupFence } from '../../plugin/protect/group-fence.ts'
import { ProtectedVm } from '../../plugin/protect/protected-vm.ts'
import type { ProtectedVmOptions } from '../../plugin/protect/protect-settings.ts'
import type { HoldRequest } from '../../plugin/protect/suspension.ts'
import type { VmState } from '../../plugin/protect/vm-state.ts'
import { sameContent } from './bare-load.ts'
import type { BareVm } from './bare-vm.ts'

// Protection of one VM with real QEMU processes and a real agent in this process. QEMU's are bare VMs.

export const VM_ID = 100
const MiB = 1024 * 1024

export type SiteOptions = Partial<Pick<ProtectSettings, 'syncRateBytesPerSec' | 'proofEveryMs' | 'rotateEveryMs' | 'roundEveryMs' | 'memoryBytesPerVm' | 'existingNbdServers'>> & {
  /** The recovery site compares by hash. */
  compares?: true
}

const identity = async (authority: Authority, usage: 'server' | 'client', commonName: string): Promise<TlsIdentity> => {
  const keyPair = await createKeyPair()
  const certificatePem = await issueCertificate(authority, { commonName, publicKeyPem: keyPair.publicKeyPem, usage, validForMs: 86_400_000 })
  return { certificatePem, privateKeyPem: keyPair.privateKeyPem, authorityPem: authority.certificatePem }
}

/** Of the group that a VM of a site is in. */
export const fenceOf = ({ vpg, settings: { stateDirectory } }: Pick<ProtectedVmOptions, 'vpg' | 'settings'>, generation?: number): GroupFence => new GroupFence({ stateDirectory, vpg, generation, log: silentLogger, nowUnixMs: Date.now })

export class ProtectedSite implements AsyncDisposable {
  readonly dir: string
  readonly changes: VmState[] = []
  /** What the VM said of a recovery site that has forgotten a handover. */
  readonly ahead: string[] = []
  /** What a ProtectedVm of this site needs, but for what it tells. */
  readonly vmOptions: Omit<ProtectedVmOptions, 'onChange' | 'onNews' | 'groupClock' | 'log' | 'fence'>
  readonly clock = new GroupClock()
  readonly registry: VmRegistry
  readonly ingest: Ingest
  readonly catalogue: Catalogue
  readonly points: PointServer
  readonly vm: ProtectedVm
  readonly #stack: AsyncDisposableStack
  #pointNumber = 0
  #waiters: (() => void)[] = []

  readonly #generation: number | undefined

  private constructor(dir: string, vmOptions: ProtectedSite['vmOptions'], registry: VmRegistry, ingest: Ingest, catalogue: Catalogue, points: PointServer, stack: AsyncDisposableStack, generation: number | undefined) {
    this.dir = dir
    this.vmOptions = vmOptions
    this.registry = registry
    this.ingest = ingest
    this.catalogue = catalogue
    this.points = points
    this.#stack = stack
    this.#generation = generation
    this.vm = this.another()
  }

  /** A plugin for this site in this process, beside `vm`. */
  another(options: Partial<ProtectSettings> = {}): ProtectedVm {
    return new ProtectedVm({
      ...this.vmOptions, settings: { ...this.vmOptions.settings, ...options }, groupClock: this.clock.buffer, fence: fenceOf(this.vmOptions, this.#generation), log: silentLogger, onNews: () => undefined,
      roundMark: () => roundMark('r'),
      onAhead: ({ message }) => this.ahead.push(message),
      onChange: (_id, state) => this.noted(state),
    })
  }

  /** @param generation in which this site has the group */
  static async start({ compares, ...options }: SiteOptions = {}, generation?: number): Promise<ProtectedSite> {
    await using stack = new AsyncDisposableStack()
    const dir = await mkdtemp('/tmp/cdp-')
    stack.defer(() => rm(dir, { recursive: true, force: true }))
    for (const name of ['run', 'pve', 'state', 'sockets']) await mkdir(join(dir, name))
    const authority = await createAuthority({ name: 'test' })
    const [server, client] = [await identity(authority, 'server', 'recovery'), await identity(authority, 'client', 'site-a')]
    const sealer = stack.use(new SegmentSealer())
    const catalogue = stack.adopt(new Catalogue(':memory:'), (one) => one[Symbol.dispose]())
    const registry = stack.use(new VmRegistry({ directory: join(dir, 'vms'), catalogue, sealer, log: silentLogger, clock: { nowUnixMs: Date.now }, onValid: () => undefined }))
    const hashes = compares === true ? { hashes: stack.use(new HashDesk({ pins: new PinRegistry() })) } : {}
    const ingest = stack.adopt(new Ingest({ registry, catalogue, generations: new GroupGenerations(join(dir, 'generations'), Date.now), log: silentLogger, ...hashes }), (one) => one[Symbol.dispose]())
    const listener = stack.use(await listenSecure({ host: '127.0.0.1', port: 0, tls: server, log: silentLogger, onStream: (socket, peer) => ingest.take(socket, peer.siteId), onPair: (socket) => void socket.destroy() }))
    const points = stack.use(await PointServer.listen({ socketPath: join(dir, 'points.sock') }))
    const site = new ProtectedSite(dir, {
      vmId: VM_ID, vpg: 'shop', vms: [String(VM_ID)], agent: { host: '127.0.0.1', port: listener.port, tls: client },
      settings: {
        paths: { qemuServerDirectory: join(dir, 'run'), pveDirectory: join(dir, 'pve') }, stateDirectory: join(dir, 'state'), runDirectory: join(dir, 'sockets'), memoryBytesPerVm: 16 * MiB, lingerMs: 5,
        syncRateBytesPerSec: 0, verify: { everyMs: 0, rateBytesPerSec: 0 }, proofEveryMs: 1000, rotateEveryMs: 3_600_000, slowAck: { p99Ms: 5000, maxMs: 5000 }, existingNbdServers: {}, ...options,
      },
    }, registry, ingest, catalogue, points, stack.move(), generation)
    return site
  }

  get state(): VmState['is'] {
    return this.vm.state.is
  }

  get store(): VmStore {
    const found = this.registry.get('site-a', String(VM_ID)) ?? this.registry.list()[0]
    return found.store
  }

  noted(state: VmState): void {
    this.changes.push(state)
    for (const wake of this.#waiters.splice(0)) wake()
  }

  async until(done: () => boolean): Promise<void> {
    while (!done()) await new Promise<void>((resolve) => this.#waiters.push(resolve))
  }

  /** Resolves with the next state of that kind; `from`: how many changes are old. */
  async next(is: VmState['is'], from = this.changes.length): Promise<VmState> {
    await this.until(() => this.changes.slice(from).some((state) => state.is === is))
    return this.changes.slice(from).find((state) => state.is === is) as VmState
  }

  /** As Proxmox lays it out: this QEMU is VM 100 now. */
  async runs(vm: BareVm): Promise<void> {
    await rm(join(this.dir, `run/${VM_ID}.qmp`), { force: true })
    await symlink(vm.qmpPath, join(this.dir, `run/${VM_ID}.qmp`))
    await writeFile(join(this.dir, `run/${VM_ID}.pid`), `${vm.pid}\n`)
  }

  /** The VM runs and is protected. */
  async inStep(vm: BareVm): Promise<void> {
    await this.runs(vm)
    this.vm.start()
    await this.until(() => this.state === 'streaming')
  }

  /** Resolves when every disk of the VM belongs to checkpoints, as the recovery site has it too. */
  async untilJoined(vm: ProtectedVm = this.vm): Promise<void> {
    while (vm.state.is !== 'streaming' || vm.joining !== undefined || this.store.disks.some(({ joining }) => joining)) await new Promise((resolve) => setTimeout(resolve, 10))
  }

  /** Resolves when something that the guest wrote was captured. */
  async untilCaptured(): Promise<void> {
    for (;;) {
      const captured = await this.vm.streamingWorker?.ask('captured', {})
      if (captured !== undefined && Object.values(captured.bytes).some((bytes) => bytes > 0)) return
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  }

  /** A plugin for this site in a process of its own, for `vm` not to be started. */
  keeper(options: Partial<ProtectSettings> = {}): Keeper {
    return new Keeper({ ...this.vmOptions, settings: { ...this.vmOptions.settings, ...options } })
  }

  /** Cuts a checkpoint as a group of one does; false if capture refuses. */
  async cut(id: string): Promise<boolean> {
    const worker = this.vm.streamingWorker
    if (worker === undefined) return false
    const mark: CheckpointMark = { id, vpg: 'shop', vms: [String(VM_ID)], atUnixMs: Date.now(), kind: 'automatic' }
    return 'namedSeq' in (await worker.ask('cut', { c: this.clock.cut(), mark }))
  }

  /** With the guest stopped and capture in step: everything captured is durable, and each of these files holds what a recovery point of now holds. */
  async replicaEquals(files: Readonly<Record<string, string>>, format: 'raw' | 'qcow2' = 'raw', vm: ProtectedVm = this.vm): Promise<Record<string, boolean>> {
    const worker = vm.streamingWorker
    if (worker === undefined) throw new Error(`not in step: ${vm.state.is}: ${vm.state.why}`)
    const { seq } = await worker.ask('captured', {})
    return this.pointEquals(seq, files, format)
  }

  /** Each of these files holds what the recovery point of that sequence holds, once it is durable. */
  async pointEquals(seq: number, files: Readonly<Record<string, string>>, format: 'raw' | 'qcow2' = 'raw'): Promise<Record<string, boolean>> {
    while (this.store.durableSeq < seq) await new Promise((resolve) => setTimeout(resolve, 20))
    const pointId = `p${this.#pointNumber++}`
    const point = await this.points.openPoint({ pointId, vms: [{ vm: String(VM_ID), vmDirectory: this.store.directory, seq }] })
    try {
      const same: Record<string, boolean> = {}
      for (const [key, path] of Object.entries(files)) {
        const disk = point.disks.find((one) => one.key === key)
        same[key] = disk !== undefined && (await sameContent(disk.uri, path, format))
      }
      return same
    } finally {
      await this.points.closePoint(pointId)
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.vm.stop(true)
    await this.#stack[Symbol.asyncDispose]()
  }
}

let rounds = 0

/** The checkpoint of an incremental round, as a group of one VM makes it. */
export const roundMark = (prefix: string): CheckpointMark => ({ id: `${prefix}${++rounds}`, vpg: 'shop', vms: [String(VM_ID)], atUnixMs: Date.now() + rounds, kind: 'automatic' })

/** A plugin that protects the one VM, and dies as processes do. */
export class Keeper implements AsyncDisposable {
  readonly states: VmState[] = []
  readonly #child: ChildProcess
  readonly #exited: Promise<unknown>
  #answers: ((answer: unknown) => void)[] = []
  #waiters: (() => void)[] = []
  #stderr = ''

  constructor(options: ProtectedSite['vmOptions']) {
    const child = spawn(process.execPath, [fileURLToPath(new URL('./vm-keeper.ts', import.meta.url)), JSON.stringify(options)], { stdio: ['pipe', 'pipe', 'pipe'], env: { ...process.env, NODE_OPTIONS: '' } })
    this.#child = child
    this.#exited = once(child, 'exit').then(() => this.#wake())
    child.stderr.setEncoding('utf8').on('data', (text: string) => (this.#stderr += text))
    createInterface({ input: child.stdout }).on('line', (line) => {
      const told = JSON.parse(line) as { state?: VmState; answer?: unknown }
      if (told.state === undefined) this.#answers.shift()?.(told.answer)
      else this.states.push(told.state)
      this.#wake()
    })
  }

  get state(): VmState['is'] | undefined {
    return this.states.at(-1)?.is
  }

  async until(is: VmState['is']): Promise<void> {
    while (this.state !== is) await this.next()
  }

  /** Resolves when it has told something more. */
  async next(): Promise<void> {
    if (this.#child.exitCode !== null) throw new Error(`the plugin has ended: ${this.#stderr}`)
    await new Promise<void>((resolve) => this.#waiters.push(resolve))
  }

  ask(command: { suspend: HoldRequest } | { resume: string }): Promise<unknown> {
    this.#child.stdin?.write(`${JSON.stringify(command)}\n`)
    return new Promise((resolve) => this.#answers.push(resolve))
  }

  /** SIGKILL. */
  async kill(): Promise<void> {
    this.#child.kill('SIGKILL')
    await this.#exited
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.kill()
  }

  #wake(): void {
    for (const wake of this.#waiters.splice(0)) wake()
  }
}

/** Names of jobs, nodes and exports of ours in a QEMU, and what our bitmaps hold. Sorted. */
export const oursIn = (vm: BareVm): Promise<{ parts: string[]; bitmaps: { name: string; recording: boolean; dirtyBytes: number }[] }> => vm.qmp(async (qmp) => {
  const objects = async (command: string, args = {}): Promise<Record<string, unknown>[]> => asList(await qmp.execute(command, args), command).map((one) => asObject(one, command))
  const nodes = await objects('query-named-block-nodes', { flat: true })
  const names = [
    ...nodes.map((node) => stringField(node, 'node-name')), ...(await objects('query-jobs')).map((job) => stringField(job, 'id')),
    ...(await objects('query-block-exports')).map((entry) => stringField(entry, 'id')),
  ]
  const bitmaps = nodes.flatMap((node) => optionalField(node, 'dirty-bitmaps', listField) ?? []).map((one) => asObject(one, 'a bitmap'))
    .map((one) => ({ name: optionalField(one, 'name', stringField) ?? '', recording: one['recording'] === true, dirtyBytes: Number(one['count']) })).filter(({ name }) => name.startsWith('cdp-'))
  return { parts: names.filter((name) => name.startsWith('cdp-')).sort(), bitmaps }
})
