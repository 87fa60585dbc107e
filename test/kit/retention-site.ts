import { join } from 'node:path'
import { Catalogue } from '../../agent/checkpoint/index.ts'
import type { CatalogueEntry } from '../../agent/checkpoint/index.ts'
import { FilePool, PageCache, RunMerger } from '../../agent/index/index.ts'
import { VmRegistry } from '../../agent/ingest/index.ts'
import type { SegmentSealer, VmStore } from '../../agent/journal/index.ts'
import { buildFrame, syncEndFrame } from '../../agent/journal/testing.ts'
import type { RecordSpec } from '../../agent/journal/testing.ts'
import { FrameCache, PinRegistry, ReadGate, RecoveryPoint } from '../../agent/recovery/index.ts'
import type { PointServer } from '../../agent/recovery/index.ts'
import { policyFrom, RetentionKeeper } from '../../agent/retention/index.ts'
import type { RetentionPolicy } from '../../agent/retention/index.ts'
import { EventLog } from '../../core/api/index.ts'
import { errorCode } from '../../core/errors/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import type { CheckpointMark, DiskEntry } from '../../core/record/index.ts'
import { RecordKind } from '../../core/record/index.ts'
import type { Random } from './random.ts'

export const SITE = 'site-a'
export const VPG = 'shop'
export const GROUP_VMS = ['101', '102']
export const GROUP_DISKS: DiskEntry[] = [{ disk: 0, key: 'scsi0', sizeBytes: 256 * 1024 }, { disk: 1, key: 'scsi1', sizeBytes: 128 * 1024 }]

type Write = { seq: number; disk: number; offsetBytes: number; lengthBytes: number; data: Buffer | undefined }
type Disks = Buffer[]

export type RetentionSiteOptions = {
  directory: string
  sealer: SegmentSealer
  random: Random
  policy?: Partial<RetentionPolicy>
  limits?: { segmentBytes: number; segmentRecords: number }
  pace?: (bytes: number, signal: AbortSignal) => Promise<void>
  stepBytes?: number
  cataloguePath?: string
}

/** An agent without its sockets: a group of two VMs whose writes are remembered, and a clock that a test moves. */
export class RetentionSite implements AsyncDisposable {
  readonly catalogue: Catalogue
  readonly registry: VmRegistry
  readonly keeper: RetentionKeeper
  readonly pins = new PinRegistry(() => this.nowUnixMs)
  readonly events = new EventLog()
  /** Of a test that serves any. */
  points: PointServer | undefined
  readonly merger = new RunMerger({ fanout: 4 })
  /** Wall clock of the protected site: labels. */
  nowUnixMs = Date.UTC(2026, 0, 1)
  monotonicMs = 0
  space = { freeBytes: 1e12, totalBytes: 2e12 }
  reserve: { reserveBytes?: number } = { reserveBytes: 0 }
  readonly writes = new Map<string, Write[]>(GROUP_VMS.map((vm) => [vm, []]))
  readonly seqs = new Map<string, number>(GROUP_VMS.map((vm) => [vm, 1]))
  #checkpoints = 0
  #label = 0
  readonly #random: Random
  readonly #directory: string

  private constructor(options: RetentionSiteOptions) {
    this.#random = options.random
    this.#directory = options.directory
    this.catalogue = new Catalogue(options.cataloguePath ?? ':memory:')
    this.registry = new VmRegistry({
      directory: join(options.directory, 'vms'), catalogue: this.catalogue, sealer: options.sealer, clock: { nowUnixMs: () => this.nowUnixMs }, log: silentLogger,
      onValid: () => undefined, onSealed: (_, vm) => this.merger.notify(this.vmDirectory(vm)),
      mayGrow: (siteId, vm, bytes) => this.keeper.mayGrow(siteId, vm, bytes),
      onDeleting: async (siteId, vm, vmDirectory) => {
        this.pins.forget(vmDirectory)
        await this.points?.forgetVm(vmDirectory)
        await this.keeper.forgetVm(siteId, vm)
      },
      limits: options.limits ?? { segmentBytes: 1 << 20, segmentRecords: 128 },
    })
    const { policy } = options
    this.keeper = new RetentionKeeper({
      catalogue: this.catalogue, pins: this.pins, events: this.events, log: silentLogger, directory: join(options.directory, 'retention'), reserve: this.reserve,
      policyOf: () => policyFrom({ historyMs: 3_600_000, thinning: [], promotionBytesPerSec: 1e12, ...policy }),
      storeOf: (siteId, vm) => this.registry.get(siteId, vm)?.store, space: async () => this.space,
      pace: options.pace ?? (async () => undefined), monotonicMs: () => this.monotonicMs, nowUnixMs: () => this.nowUnixMs, stepBytes: options.stepBytes ?? 1 << 30, everyMs: 1 << 30,
    })
  }

  /** Opens what is there; with `from`, goes on with what that one remembered. */
  static async open(options: RetentionSiteOptions, from?: RetentionSite): Promise<RetentionSite> {
    const site = new RetentionSite(options)
    await site.registry.openAll()
    for (const vm of GROUP_VMS) {
      const { store } = await site.registry.open(SITE, vm)
      if (store.epoch === 0) {
        await store.beginEpoch(GROUP_DISKS)
        store.accept(syncEndFrame(1))
        await store.flush()
      } else await store.resumeEpoch(store.epoch)
    }
    if (from !== undefined) site.#takeOver(from)
    await site.keeper.start()
    return site
  }

  vmDirectory(vm: string): string {
    return join(this.#directory, 'vms', SITE, vm)
  }

  store(vm: string): VmStore {
    const found = this.registry.get(SITE, vm)
    if (found === undefined) throw new Error(`no store of ${vm}`)
    return found.store
  }

  /** Time goes by on every clock. */
  pass(ms: number): void {
    this.nowUnixMs += ms
    this.monotonicMs += ms
  }

  /** Some writes on every VM, then one checkpoint over all of them. Durable with the next `flush`. */
  cut(options: { writes?: number; maxSectors?: number; tag?: string; vms?: readonly string[] } = {}): string {
    const id = `c${++this.#checkpoints}`
    this.#label = Math.max(this.#label + 1, this.nowUnixMs)
    const mark: CheckpointMark = { id, vpg: VPG, vms: GROUP_VMS, atUnixMs: this.#label, kind: options.tag === undefined ? 'automatic' : 'tagged', ...(options.tag === undefined ? {} : { tag: options.tag }) }
    for (const vm of options.vms ?? GROUP_VMS) {
      const firstSeq = (this.seqs.get(vm) ?? 0) + 1
      const records: RecordSpec[] = []
      for (let n = options.writes ?? 2; n > 0; n--) records.push(this.#write(vm, firstSeq + records.length, options.maxSectors ?? 4))
      const namedSeq = firstSeq + records.length - 1
      records.push({ kind: RecordKind.checkpoint, offsetBytes: namedSeq, json: mark })
      this.store(vm).accept(buildFrame({ firstSeq, epoch: this.store(vm).epoch, atUnixMs: this.#label, records }))
      this.seqs.set(vm, namedSeq + 1)
    }
    return id
  }

  /** What a full sync leaves in the journal: every byte of the disks, as the source has it, between the marks of a sync. */
  rewrite(vm: string, part: 'begin' | 'all' = 'all', before?: string): void {
    const firstSeq = (this.seqs.get(vm) ?? 0) + 1
    const [newest] = [...this.#models(vm, [{ namedSeqs: { [vm]: Infinity } } as unknown as CatalogueEntry])]
    const records: RecordSpec[] = [{ kind: RecordKind.syncBegin, json: { kind: 'delta', reason: 'a test', before } }]
    for (const { disk } of GROUP_DISKS) {
      const data = Buffer.from(newest[1][disk])
      this.writes.get(vm)?.push({ seq: firstSeq + records.length, disk, offsetBytes: 0, lengthBytes: data.length, data })
      records.push({ kind: RecordKind.sync, disk, data })
    }
    if (part === 'all') records.push({ kind: RecordKind.syncEnd, json: { kind: 'delta' } })
    this.store(vm).accept(buildFrame({ firstSeq, epoch: this.store(vm).epoch, atUnixMs: this.#label, records }))
    this.seqs.set(vm, firstSeq + records.length - 1)
  }

  /** A sync that has looked at everything, and found nothing to copy. */
  compare(vm: string, before?: string): void {
    const firstSeq = (this.seqs.get(vm) ?? 0) + 1
    const records: RecordSpec[] = [{ kind: RecordKind.syncBegin, json: { kind: 'delta', reason: 'a test', before } }, { kind: RecordKind.syncEnd, json: { kind: 'delta', sentBytes: 0 } }]
    this.store(vm).accept(buildFrame({ firstSeq, epoch: this.store(vm).epoch, atUnixMs: this.#label, records }))
    this.seqs.set(vm, firstSeq + 1)
  }

  async flush(): Promise<void> {
    for (const vm of GROUP_VMS) await this.store(vm).flush()
  }

  async settle(): Promise<void> {
    for (const vm of GROUP_VMS) await this.store(vm).sealingIdle()
    await this.merger.idle()
  }

  list(): CatalogueEntry[] {
    return this.catalogue.list(SITE, VPG, { limit: 100_000 }).filter(({ state }) => state !== 'pending')
  }

  get group() {
    const group = this.keeper.group(SITE, VPG)
    if (group === undefined) throw new Error('no group yet')
    return group
  }

  bases(): number[] {
    return GROUP_VMS.map((vm) => this.store(vm).baseSeq)
  }

  /** Every one of these checkpoints is what was written up to it, on every disk. @throws with the first that is not */
  async expectExact(entries: readonly CatalogueEntry[]): Promise<void> {
    for (const vm of GROUP_VMS) {
      await using files = new FilePool(16)
      const shared = { files, pages: new PageCache(1 << 18), frames: new FrameCache(1 << 20), gate: new ReadGate(4) }
      for (const [entry, disks] of this.#models(vm, entries)) {
        await using point = await RecoveryPoint.open({ ...shared, vmDirectory: this.vmDirectory(vm), seq: entry.namedSeqs[vm] })
        for (const { disk, sizeBytes } of GROUP_DISKS) {
          const found = Buffer.concat(await point.read(disk, 0, sizeBytes))
          if (!found.equals(disks[disk])) throw new Error(`${entry.id} of VM ${vm}, disk ${disk}: differs from byte ${found.findIndex((byte, at) => byte !== disks[disk][at])}`)
        }
      }
    }
  }

  /** The state after `seq` has left the history, and says so. @throws if it opens, or fails otherwise */
  async expectRefused(vm: string, seq: number): Promise<void> {
    await using files = new FilePool(16)
    const opening = RecoveryPoint.open({ files, pages: new PageCache(1 << 18), frames: new FrameCache(1 << 20), gate: new ReadGate(4), vmDirectory: this.vmDirectory(vm), seq })
    const outcome = await opening.then(() => 'it opened', (error: unknown) => errorCode(error))
    if (outcome !== 'NOT_FOUND') throw new Error(`sequence ${seq} of VM ${vm} is not refused: ${outcome}`)
  }

  /** Which checkpoints cannot be read as they were, by reading every disk of every one. @throws what a read threw that does not have one of these codes */
  async unreadable(codes: readonly string[] = ['JOURNAL_DAMAGED']): Promise<string[]> {
    const ids: string[] = []
    for (const entry of this.list()) {
      await using files = new FilePool(16)
      const shared = { files, pages: new PageCache(1 << 18), frames: new FrameCache(1 << 20), gate: new ReadGate(4) }
      let isWhole = true
      for (const vm of GROUP_VMS) {
        try {
          await using point = await RecoveryPoint.open({ ...shared, vmDirectory: this.vmDirectory(vm), seq: entry.namedSeqs[vm] })
          for (const { disk, sizeBytes } of GROUP_DISKS) await point.read(disk, 0, sizeBytes)
        } catch (error) {
          if (!codes.includes(errorCode(error) ?? '')) throw error
          isWhole = false
        }
      }
      if (!isWhole) ids.push(entry.id)
    }
    return ids.sort()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.keeper[Symbol.asyncDispose]()
    await this.registry[Symbol.asyncDispose]()
    await this.merger[Symbol.asyncDispose]()
    this.catalogue[Symbol.dispose]()
  }

  *#models(vm: string, entries: readonly CatalogueEntry[]): Generator<[CatalogueEntry, Disks]> {
    const disks = GROUP_DISKS.map(({ sizeBytes }) => Buffer.alloc(sizeBytes))
    const writes = this.writes.get(vm) ?? []
    let at = 0
    for (const entry of [...entries].sort((a, b) => a.namedSeqs[vm] - b.namedSeqs[vm])) {
      for (; at < writes.length && writes[at].seq <= entry.namedSeqs[vm]; at++) {
        const { disk, offsetBytes, lengthBytes, data } = writes[at]
        if (data === undefined) disks[disk].fill(0, offsetBytes, offsetBytes + lengthBytes)
        else data.copy(disks[disk], offsetBytes)
      }
      yield [entry, disks]
    }
  }

  #write(vm: string, seq: number, maxSectors: number): RecordSpec {
    const random = this.#random
    const { disk, sizeBytes } = GROUP_DISKS[random.int(0, GROUP_DISKS.length)]
    const lengthBytes = random.int(1, maxSectors + 1) * 512
    const offsetBytes = random.int(0, (sizeBytes - lengthBytes) / 512 + 1) * 512
    const isData = random.chance(0.85)
    const data = isData ? Buffer.alloc(lengthBytes, random.int(1, 256)) : undefined
    data?.writeUInt32LE(seq, 0)
    this.writes.get(vm)?.push({ seq, disk, offsetBytes, lengthBytes, data })
    if (data !== undefined) return { kind: RecordKind.write, disk, offsetBytes, data }
    return { kind: random.chance(0.5) ? RecordKind.zero : RecordKind.discard, disk, offsetBytes, lengthBytes }
  }

  #takeOver(from: RetentionSite): void {
    for (const vm of GROUP_VMS) {
      this.writes.set(vm, from.writes.get(vm) ?? [])
      this.seqs.set(vm, from.seqs.get(vm) ?? 1)
    }
    this.#checkpoints = from.#checkpoints
    this.#label = from.#label
    this.nowUnixMs = from.nowUnixMs
    this.monotonicMs = from.monotonicMs
  }
}
