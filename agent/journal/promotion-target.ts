import { join } from 'node:path'
import { ExtentSums, sumsFileName } from '../mirror/index.ts'
import type { MirrorDisk, MirrorStorage } from '../mirror/index.ts'
import { WriteLanes } from './write-lanes.ts'
import type { DiskEntry } from '../../core/record/index.ts'

/** A stretch of a disk to be written or zeroed; none of a batch overlaps another. */
export type Stretch = { disk: number; offsetBytes: number; lengthBytes: number; data: Buffer | undefined }

/** What is dirty is made durable in parts, so that the last step is short and the journal's own fdatasync never waits for all of it. */
const SYNC_EVERY_BYTES = 64 * 1024 * 1024
const MAX_BUFFERS = 256
const MAX_WRITE_BYTES = 4 * 1024 * 1024

/** The mirror disks that a promotion writes to, opened when first needed; those of disks that were removed too. */
export class PromotionTarget implements AsyncDisposable {
  readonly #storage: MirrorStorage
  readonly #sizes: Map<number, number>
  readonly #disks = new Map<number, MirrorDisk>()
  readonly #sums = new Map<number, ExtentSums>()
  #unsyncedBytes = 0
  writtenBytes = 0

  constructor(storage: MirrorStorage, disks: readonly DiskEntry[]) {
    this.#storage = storage
    this.#sizes = new Map(disks.map(({ disk, sizeBytes }) => [disk, sizeBytes]))
  }

  /** Lets the mirror of a disk be at least so large. A mirror larger than its disk was harms nobody: what is new reads as zeroes. */
  async grow(disk: number, sizeBytes: number): Promise<void> {
    await (await this.#open(disk)).grow(sizeBytes)
  }

  /** Applies a batch in order of the disk; neighbours become one write. */
  async apply(batch: Stretch[]): Promise<void> {
    const lanes = new WriteLanes()
    try {
      await this.#apply(batch, lanes)
      await lanes.drain()
    } finally {
      // Whatever failed, nothing is under way any more: the caller uses the memory again.
      await lanes.settle()
    }
    if (this.#unsyncedBytes >= SYNC_EVERY_BYTES) await this.datasync()
  }

  async #apply(batch: Stretch[], lanes: WriteLanes): Promise<void> {
    batch.sort((a, b) => a.disk - b.disk || a.offsetBytes - b.offsetBytes)
    for (let at = 0; at < batch.length;) {
      const first = batch[at]
      const mirror = await this.#open(first.disk)
      let endBytes = first.offsetBytes + first.lengthBytes
      const buffers: Buffer[] = first.data === undefined ? [] : [first.data]
      for (at++; at < batch.length; at++) {
        const next = batch[at]
        const goesOn = next.disk === first.disk && next.offsetBytes === endBytes && (next.data === undefined) === (first.data === undefined)
        if (!goesOn || buffers.length >= MAX_BUFFERS || endBytes - first.offsetBytes >= MAX_WRITE_BYTES) break
        endBytes += next.lengthBytes
        if (next.data !== undefined) buffers.push(next.data)
      }
      const lengthBytes = endBytes - first.offsetBytes
      // The disk of a removed number may have grown after its mirror was made.
      if (mirror.sizeBytes < endBytes) {
        await lanes.drain()
        await mirror.grow(endBytes)
      }
      if (first.data === undefined) await mirror.zero(first.offsetBytes, lengthBytes)
      else if (mirror.lanes === 1) await mirror.write(first.offsetBytes, buffers, lengthBytes)
      else await lanes.add(mirror.write(first.offsetBytes, buffers, lengthBytes), mirror.lanes)
      // As long as the intent of the promotion stands nobody compares; with the new base they are right.
      await this.#sums.get(first.disk)?.wrote(first.offsetBytes, lengthBytes, first.data === undefined ? undefined : buffers)
      this.writtenBytes += lengthBytes
      this.#unsyncedBytes += lengthBytes
    }
  }

  async datasync(): Promise<void> {
    for (const disk of this.#disks.values()) await disk.datasync()
    for (const sums of this.#sums.values()) await sums.datasync()
    this.#unsyncedBytes = 0
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const file of [...this.#disks.values(), ...this.#sums.values()]) await file[Symbol.asyncDispose]()
    this.#disks.clear()
    this.#sums.clear()
  }

  async #open(disk: number): Promise<MirrorDisk> {
    let mirror = this.#disks.get(disk)
    if (mirror === undefined) {
      mirror = await this.#storage.open({ disk, sizeBytes: this.#sizes.get(disk) ?? 0 })
      this.#disks.set(disk, mirror)
      this.#sums.set(disk, await ExtentSums.open(join(this.#storage.directory, sumsFileName(disk))))
    }
    return mirror
  }
}
