import { CdpError } from '../../core/errors/index.ts'
import type { NbdClient } from '../../core/nbd/index.ts'
import { RecordKind } from '../../core/record/index.ts'
import type { SlabPool } from '../buffer/index.ts'
import { DeltaRun } from './delta-run.ts'
import type { HashSource } from './hash-source.ts'
import type { RaceGuard, Span } from './race-guard.ts'
import type { SyncSink } from './sync-sink.ts'

const STATUS_BYTES = 256 * 1024 * 1024
const READ_BYTES = 1024 * 1024
const PROGRESS_EVERY_MS = 1_000
const BASE_ALLOCATION = 'base:allocation'
const STATE_ZERO = 2
const STATE_DIRTY = 1
const ZEROES = Buffer.alloc(READ_BYTES)

export type SyncDisk = {
  disk: number
  sizeBytes: number
  /** Everything below is at the agent already. */
  fromBytes: number
  /** Metadata context of the dirty bitmap ("qemu:dirty-bitmap:NAME") whose extents are copied: below `fromBytes` if `wholeAbove`, else everywhere. */
  bitmapContext?: string
  /** True: from `fromBytes` on everything allocated is copied; false: only what the bitmap says. */
  wholeAbove: boolean
  /** From `fromBytes` on only what differs from the replica, by hash. */
  byHash?: boolean
}

export type SyncOptions = {
  disk: SyncDisk
  client: NbdClient
  sink: SyncSink
  guard: RaceGuard
  slabs: SlabPool
  /** Resolves when `lengthBytes` more may be read: memory has room and the rate limit allows it. */
  admit: (lengthBytes: number, signal: AbortSignal) => Promise<void>
  /** `sentBytes`: what became records since the last call. */
  onProgress: (copiedBytes: number, scannedToBytes: number, sentBytes: number) => void
  readsInFlight: number
  /** Needed for a disk that is copied by hash. */
  hashes?: HashSource
  signal: AbortSignal
}

type NbdExtent = { lengthBytes: number; flags: number }
type Extent = { offsetBytes: number; lengthBytes: number; zero: boolean }

/**
 * Copies one disk from QEMU's read-only export into records: all that is allocated, or the extents of a dirty bitmap. Reads are
 * registered with the race guard before they are sent, and become records in the turn in which their reply arrives.
 * Resumable: a `syncProgress` record says below which offset the whole of the disk has been copied.
 */
export class SyncRun {
  readonly #options: SyncOptions
  readonly #inFlight = new Set<{ offsetBytes: number; done: Promise<void> }>()
  #failed: { error: unknown } | undefined
  #scannedToBytes = 0
  #fromBitmap: string | undefined
  #reportedMs = performance.now()

  constructor(options: SyncOptions) {
    this.#options = options
  }

  /** Resolves when everything has become a record. @throws what the NBD client throws, or the signal's reason */
  async run(): Promise<void> {
    const { disk } = this.#options
    if (disk.bitmapContext !== undefined) await this.#copy(0, disk.wholeAbove ? disk.fromBytes : disk.sizeBytes, disk.bitmapContext)
    if (!disk.wholeAbove) return
    const { hashes } = this.#options
    if (disk.byHash !== true) await this.#copy(disk.fromBytes, disk.sizeBytes)
    else if (hashes === undefined) throw new CdpError('INTERNAL', 'a copy by hash without a source of hashes')
    else await new DeltaRun({ ...this.#options, hashes }).run(disk.fromBytes)
  }

  async #copy(startBytes: number, endBytes: number, bitmap?: string): Promise<void> {
    this.#scannedToBytes = startBytes
    this.#fromBitmap = bitmap
    while (this.#scannedToBytes < endBytes) {
      const extents = await this.#status(this.#scannedToBytes, Math.min(STATUS_BYTES, endBytes - this.#scannedToBytes), bitmap)
      for (const extent of extents) {
        if (!extent.zero) await this.#readExtent(extent)
        this.#scannedToBytes = extent.offsetBytes + extent.lengthBytes
        this.#report()
      }
    }
    while (this.#inFlight.size > 0) await this.#oneDone()
    this.#throwIfFailed()
    this.#report(true)
  }

  /** Extents to read; zero ones have become records already. For a bitmap, clean ranges are left out. */
  async #status(offsetBytes: number, lengthBytes: number, bitmap: string | undefined): Promise<Extent[]> {
    const { client, guard, disk, sink, signal } = this.#options
    signal.throwIfAborted()
    this.#throwIfFailed()
    const read = guard.register(disk.disk, offsetBytes, lengthBytes)
    let spans: Span[] = []
    const reply = await client.blockStatus(offsetBytes, lengthBytes, signal).finally(() => (spans = read.take()))
    const extents: Extent[] = []
    let at = offsetBytes
    for (const { lengthBytes: extentBytes, zero, dirty } of overlay(reply.get(BASE_ALLOCATION), bitmap === undefined ? undefined : (reply.get(bitmap) ?? []))) {
      const bytes = Math.min(extentBytes, offsetBytes + lengthBytes - at)
      if (bytes <= 0) break
      if (zero && dirty) {
        for (const span of spans) {
          const from = Math.max(span.offsetBytes, at)
          const to = Math.min(span.offsetBytes + span.lengthBytes, at + bytes)
          if (from < to) sink.range(RecordKind.syncZero, disk.disk, from, to - from)
        }
        if (bitmap !== undefined) this.#options.onProgress(bytes, this.#copiedToBytes(), 0)
      }
      extents.push({ offsetBytes: at, lengthBytes: bytes, zero: zero || !dirty })
      at += bytes
    }
    if (extents.length === 0) throw new CdpError('NBD_PROTOCOL', `the export says nothing of ${bitmap ?? BASE_ALLOCATION}`, { context: { disk: disk.disk, offsetBytes } })
    return extents
  }

  async #readExtent(extent: Extent): Promise<void> {
    const { admit, readsInFlight, signal } = this.#options
    const endBytes = extent.offsetBytes + extent.lengthBytes
    for (let offsetBytes = extent.offsetBytes; offsetBytes < endBytes; offsetBytes += READ_BYTES) {
      const lengthBytes = Math.min(READ_BYTES, endBytes - offsetBytes)
      while (this.#inFlight.size >= readsInFlight) await this.#oneDone()
      await admit(lengthBytes, signal)
      this.#throwIfFailed()
      const entry = { offsetBytes, done: Promise.resolve() }
      entry.done = this.#read(offsetBytes, lengthBytes).then(
        () => void this.#inFlight.delete(entry),
        (error: unknown) => {
          this.#inFlight.delete(entry)
          this.#failed ??= { error }
        },
      )
      this.#inFlight.add(entry)
      this.#scannedToBytes = offsetBytes + lengthBytes
      this.#report()
    }
  }

  async #read(offsetBytes: number, lengthBytes: number): Promise<void> {
    const { client, guard, disk, sink, slabs, signal } = this.#options
    const slab = slabs.take()
    const read = guard.register(disk.disk, offsetBytes, lengthBytes)
    let spans: Span[] = []
    await client.readInto(slab, 0, offsetBytes, lengthBytes, signal).finally(() => (spans = read.take()))
    signal.throwIfAborted()
    if (slab.subarray(0, lengthBytes).equals(ZEROES.subarray(0, lengthBytes))) {
      for (const span of spans) sink.range(RecordKind.syncZero, disk.disk, span.offsetBytes, span.lengthBytes)
      slabs.give(slab)
    } else if (spans.length === 1 && spans[0].lengthBytes === lengthBytes && lengthBytes >= READ_BYTES / 4) {
      sink.takeLarge(RecordKind.sync, disk.disk, offsetBytes, lengthBytes, slab)
    } else {
      for (const span of spans) {
        for (let at = 0; at < span.lengthBytes; at += 64 * 1024) {
          const start = span.offsetBytes - offsetBytes + at
          sink.sync(disk.disk, span.offsetBytes + at, slab, start, start + Math.min(64 * 1024, span.lengthBytes - at))
        }
      }
      slabs.give(slab)
    }
    this.#options.onProgress(lengthBytes, this.#copiedToBytes(), lengthBytes)
  }

  async #oneDone(): Promise<void> {
    await Promise.race([...this.#inFlight].map(({ done }) => done))
  }

  /** Below this offset nothing is under way any more. */
  #copiedToBytes(): number {
    let lowest = this.#scannedToBytes
    for (const { offsetBytes } of this.#inFlight) if (offsetBytes < lowest) lowest = offsetBytes
    return lowest
  }

  /** Says how far the copy has come; never beyond a read that failed: its gap would be taken for copied. */
  #report(now = false): void {
    if (this.#failed !== undefined) return
    if (!now && performance.now() - this.#reportedMs < PROGRESS_EVERY_MS) return
    this.#reportedMs = performance.now()
    const copiedToBytes = this.#copiedToBytes()
    if (this.#fromBitmap === undefined) this.#options.sink.range(RecordKind.syncProgress, this.#options.disk.disk, copiedToBytes, 0)
    this.#options.onProgress(0, copiedToBytes, 0)
  }

  #throwIfFailed(): void {
    if (this.#failed !== undefined) throw this.#failed.error
  }
}

/**
 * Both contexts over the same range, cut where either changes. Without a bitmap everything counts as dirty; with one, an export that says nothing of zeroes has none.
 * It ends where the one ends that says least.
 */
const overlay = (allocation: readonly NbdExtent[] | undefined, bitmap: readonly NbdExtent[] | undefined): { lengthBytes: number; zero: boolean; dirty: boolean }[] => {
  const wholly = (flags: number): NbdExtent[] => [{ lengthBytes: Number.MAX_SAFE_INTEGER, flags }]
  if (bitmap === undefined) return (allocation ?? []).map(({ lengthBytes, flags }) => ({ lengthBytes, zero: (flags & STATE_ZERO) !== 0, dirty: true }))
  const [zeroes, dirt] = [allocation === undefined || allocation.length === 0 ? wholly(0) : allocation, bitmap]
  const result: { lengthBytes: number; zero: boolean; dirty: boolean }[] = []
  let [z, d, zLeft, dLeft] = [0, 0, zeroes[0].lengthBytes, dirt[0]?.lengthBytes ?? 0]
  while (z < zeroes.length && d < dirt.length) {
    const lengthBytes = Math.min(zLeft, dLeft)
    result.push({ lengthBytes, zero: (zeroes[z].flags & STATE_ZERO) !== 0, dirty: (dirt[d].flags & STATE_DIRTY) !== 0 })
    zLeft -= lengthBytes
    dLeft -= lengthBytes
    if (zLeft === 0) zLeft = zeroes[++z]?.lengthBytes ?? 0
    if (dLeft === 0) dLeft = dirt[++d]?.lengthBytes ?? 0
  }
  return result
}
