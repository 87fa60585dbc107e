import { closeSync, openSync, writeSync } from 'node:fs'
import { RecordKind } from '../../core/record/index.ts'
import type { Compressor, DiskEntry } from '../../core/record/index.ts'
import type { Random } from './random.ts'
import { VmWriter } from './vm-writer.ts'

type Step = { seq: number; disk: number; offsetBytes: number; data: Buffer | undefined; lengthBytes: number }

const DATA_KINDS = [RecordKind.write, RecordKind.sync]
const ZERO_KINDS = [RecordKind.zero, RecordKind.discard, RecordKind.syncZero]

/** A random history of a VM with several disks in small segments, and the model it is compared with: plain arrays. */
export class RandomHistory {
  readonly writer: VmWriter
  readonly disks: DiskEntry[]
  readonly #random: Random
  readonly #bases: Buffer[]
  readonly #steps: Step[] = []
  readonly #recordsPerSegment: number

  constructor(directory: string, random: Random, options: { compress?: Compressor; diskBytes?: number } = {}) {
    this.#random = random
    const diskBytes = options.diskBytes ?? 512 * 1024
    this.disks = Array.from({ length: random.int(1, 4) }, (_, disk) => ({ disk, key: `scsi${disk}`, sizeBytes: diskBytes - 512 * random.int(0, 100) }))
    this.writer = new VmWriter({ directory, vm: 'vm-1', disks: this.disks, compress: options.compress })
    this.#recordsPerSegment = random.int(4, 40)
    this.#bases = this.disks.map((disk) => this.#makeBase(disk))
  }

  /** Adds records, in frames and segments of random size. */
  grow(records: number): void {
    const random = this.#random
    let inFrame = random.int(1, 12)
    for (let n = 0; n < records; n++) {
      this.#addRecord()
      if (--inFrame === 0) {
        this.#writeFrame()
        inFrame = random.int(1, 12)
      }
    }
    this.#writeFrame()
  }

  /** The disk as of a sequence. */
  modelAt(seq: number, disk: number): Buffer {
    const model = Buffer.from(this.#bases[disk])
    for (const step of this.#steps) {
      if (step.seq > seq) break
      if (step.disk !== disk) continue
      if (step.data === undefined) model.fill(0, step.offsetBytes, step.offsetBytes + step.lengthBytes)
      else step.data.copy(model, step.offsetBytes)
    }
    return model
  }

  /** Moves the base up to `seq`, as promotion does, in the mirror's files only. */
  promote(seq: number): void {
    for (const { disk } of this.disks) {
      const model = this.modelAt(seq, disk)
      const fd = openSync(this.writer.mirrorPath(disk), 'r+')
      writeSync(fd, model, 0, model.length, 0)
      closeSync(fd)
    }
    this.writer.setBase(seq)
  }

  [Symbol.dispose](): void {
    this.writer[Symbol.dispose]()
  }

  #writeFrame(): void {
    this.writer.writeFrame()
    if (this.writer.recordsInSegment >= this.#recordsPerSegment) this.writer.closeSegment()
  }

  #addRecord(): void {
    const random = this.#random
    const { frame } = this.writer
    const seq = this.writer.nextSeq + frame.recordCount
    if (random.chance(0.05)) {
      frame.addJson(RecordKind.checkpoint, seq, `{"id":"c${seq}"}`)
      return
    }
    const { disk, sizeBytes } = this.disks[random.int(0, this.disks.length)]
    const sectors = sizeBytes / 512
    // Some places are written again and again, others rarely.
    const start = random.chance(0.5) ? random.int(0, Math.min(64, sectors)) : random.int(0, sectors)
    const length = Math.min(sectors - start, random.chance(0.1) ? random.int(1, 400) : random.int(1, 16))
    const step: Step = { seq, disk, offsetBytes: start * 512, lengthBytes: length * 512, data: undefined }
    if (random.chance(0.7)) {
      step.data = Buffer.alloc(step.lengthBytes, random.int(1, 256))
      for (let at = 0; at < step.lengthBytes; at += 512) step.data.writeUInt32LE(random.u32(), at)
      const at = frame.reserveData(DATA_KINDS[random.int(0, 2)], disk, step.offsetBytes, step.lengthBytes)
      step.data.copy(frame.payload, at)
    } else {
      frame.addRange(ZERO_KINDS[random.int(0, 3)], disk, step.offsetBytes, step.lengthBytes)
    }
    this.#steps.push(step)
  }

  #makeBase({ disk, sizeBytes }: DiskEntry): Buffer {
    const base = Buffer.alloc(sizeBytes)
    const fd = openSync(this.writer.mirrorPath(disk), 'r+')
    for (let n = 0; n < 4; n++) {
      const at = this.#random.int(0, sizeBytes / 4096) * 4096
      const data = Buffer.alloc(Math.min(4096 * this.#random.int(1, 8), sizeBytes - at), this.#random.int(1, 256))
      data.copy(base, at)
      writeSync(fd, data, 0, data.length, at)
    }
    closeSync(fd)
    return base
  }
}
