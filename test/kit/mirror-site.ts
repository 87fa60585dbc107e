import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { FilePool, PageCache } from '../../agent/index/index.ts'
import { buildFrame, syncEndFrame } from '../../agent/journal/testing.ts'
import type { RecordSpec } from '../../agent/journal/testing.ts'
import { SegmentSealer, VmStore } from '../../agent/journal/index.ts'
import { MirrorStorage } from '../../agent/mirror/index.ts'
import type { MirrorSpec } from '../../agent/mirror/index.ts'
import { FrameCache, ReadGate, RecoveryPoint } from '../../agent/recovery/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { RecordKind } from '../../core/record/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import { LoopDevice } from './loop-device.ts'
import type { Random } from './random.ts'

export const KINDS = ['file', 'qcow2', 'device'] as const
export type Kind = (typeof KINDS)[number]
const SECTOR = 512
const CHUNK = 256 * 1024

/** A store whose mirrors are of one kind, a source that writes to it at random, and what its disks have to hold after each record. */
export class MirrorSite implements AsyncDisposable {
  readonly directory: string
  readonly disks: DiskEntry[]
  readonly models: Buffer[]
  readonly specs = new Map<string, MirrorSpec>()
  readonly #random: Random
  readonly #held = new AsyncDisposableStack()
  readonly #sealer: SegmentSealer
  readonly devices: LoopDevice[] = []
  nextSeq = 1
  epoch = 0
  storage!: MirrorStorage
  store!: VmStore

  private constructor(directory: string, random: Random, disks: DiskEntry[]) {
    this.directory = directory
    this.disks = disks
    this.#random = random
    this.models = disks.map(({ sizeBytes }) => Buffer.alloc(sizeBytes))
    this.#sealer = this.#held.use(new SegmentSealer())
  }

  static async make(directory: string, kind: Kind, random: Random, how: { sectorBytes?: number; storageDirectory?: string; diskBytes?: number; deadlineMs?: number } = {}): Promise<MirrorSite> {
    const sizeBytes = how.diskBytes ?? 4 * 1024 * 1024
    const site = new MirrorSite(directory, random, ['scsi0', 'scsi1'].map((key, disk) => ({ disk, key, sizeBytes })))
    const storages = how.storageDirectory ?? directory
    mkdirSync(directory, { recursive: true })
    for (const { key } of site.disks) {
      if (kind === 'qcow2') site.specs.set(key, { kind, path: join(storages, `${key}.qcow2`) })
      if (kind !== 'device') continue
      // What was on it before: all of it is overwritten by the first copy.
      const image = join(storages, `${key}.img`)
      writeFileSync(image, Buffer.alloc(sizeBytes + 1024 * 1024, 0xa5))
      const device = site.#held.use(await LoopDevice.attach(image, sizeBytes + 1024 * 1024, how))
      site.devices.push(device)
      site.specs.set(key, { kind, path: device.path, claim: true })
    }
    await site.open(how.deadlineMs)
    return site
  }

  async open(deadlineMs?: number): Promise<void> {
    this.storage = new MirrorStorage({ vmDirectory: this.directory, choose: ({ key }) => this.specs.get(key) ?? { kind: 'file' }, ...(deadlineMs === undefined ? {} : { deadlineMs }) })
    this.store = await VmStore.open({ directory: this.directory, vm: 'site/101', log: silentLogger, clock: { nowUnixMs: () => 1 }, sealer: this.#sealer, mirrors: this.storage, limits: { segmentBytes: 1024 * 1024 } })
  }

  async attach(): Promise<void> {
    const answer = await this.store.beginEpoch(this.disks)
    this.epoch = answer.epoch
    this.nextSeq = answer.durableSeq + 1
  }

  /** The first copy: every byte of the source becomes data or zeroes. */
  copyAll(): void {
    for (const { disk, sizeBytes } of this.disks) {
      for (let offsetBytes = 0; offsetBytes < sizeBytes; offsetBytes += CHUNK) {
        if (this.#random.int(0, 3) === 0) this.send(true, { kind: RecordKind.syncZero, disk, offsetBytes, lengthBytes: CHUNK })
        else this.send(true, { kind: RecordKind.sync, disk, offsetBytes, data: this.#bytes(CHUNK) })
      }
    }
  }

  endCopy(): void {
    this.store.accept(syncEndFrame(this.nextSeq++, this.epoch))
  }

  /** So many writes, zeroes and discards of the guest. @returns the last sequence */
  write(count: number, direct = false): number {
    for (let done = 0; done < count; done++) {
      const disk = this.#random.int(0, this.disks.length)
      const sectors = this.disks[disk].sizeBytes / SECTOR
      const lengthBytes = (1 + this.#random.int(0, 64)) * SECTOR
      const offsetBytes = Math.min(this.#random.int(0, sectors) * SECTOR, sectors * SECTOR - lengthBytes)
      const kind = [RecordKind.write, RecordKind.write, RecordKind.write, RecordKind.zero, RecordKind.discard][this.#random.int(0, 5)]
      this.send(direct, kind === RecordKind.write ? { kind, disk, offsetBytes, data: this.#bytes(lengthBytes) } : { kind, disk, offsetBytes, lengthBytes })
    }
    return this.nextSeq - 1
  }

  /** A disk of the guest grows. */
  grow(disk: number, sizeBytes: number): void {
    this.models[disk] = Buffer.concat([this.models[disk], Buffer.alloc(sizeBytes - this.models[disk].length)])
    this.disks[disk] = { ...this.disks[disk], sizeBytes }
    this.send(false, { kind: RecordKind.resize, disk, offsetBytes: sizeBytes })
  }

  send(direct: boolean, record: RecordSpec): void {
    this.store.accept(buildFrame({ firstSeq: this.nextSeq++, epoch: this.epoch, direct, records: [record] }))
    const { kind, disk = 0, offsetBytes = 0, lengthBytes = 0, data } = record
    if (kind === RecordKind.resize) return
    if (data !== undefined) data.copy(this.models[disk], offsetBytes)
    else this.models[disk].fill(0, offsetBytes, offsetBytes + lengthBytes)
  }

  snapshot(): Buffer[] {
    return this.models.map((model) => Buffer.from(model))
  }

  /** A recovery point reads, and calls holes, what was there after `seq`. @returns what is wrong, for `toEqual([])` */
  async differences(seq: number, models: readonly Buffer[]): Promise<string[]> {
    await using files = new FilePool(32)
    const disks = this.disks.map((one, index) => ({ ...one, sizeBytes: models[index].length }))
    await using point = await RecoveryPoint.open({ vmDirectory: this.directory, seq, disks, pages: new PageCache(1 << 20), frames: new FrameCache(4 << 20), gate: new ReadGate(4), files })
    const wrong: string[] = []
    for (const [index, model] of models.entries()) {
      for (let at = 0; at < model.length; at += CHUNK) {
        const read = Buffer.concat(await point.read(index, at, Math.min(CHUNK, model.length - at)))
        if (!read.equals(model.subarray(at, at + read.length))) wrong.push(`disk ${index} at ${at} as of ${seq}`)
      }
      for (let at = 0; at < model.length;) {
        for (const { lengthBytes, isHole } of await point.blockStatus(index, at, model.length - at)) {
          if (isHole && model.subarray(at, at + lengthBytes).some((byte) => byte !== 0)) wrong.push(`disk ${index}: data called a hole at ${at}`)
          at += lengthBytes
        }
      }
    }
    return wrong
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.store[Symbol.asyncDispose]()
    await this.#held[Symbol.asyncDispose]()
  }

  #bytes(lengthBytes: number): Buffer {
    const bytes = Buffer.alloc(lengthBytes)
    for (let at = 0; at < lengthBytes; at += SECTOR) bytes.fill(1 + this.#random.int(0, 255), at, at + SECTOR)
    return bytes
  }
}
