import { hash } from 'node:crypto'
import { CdpError, errorCode } from '../../core/errors/index.ts'
import type { NbdClient } from '../../core/nbd/index.ts'
import { HASH_BYTES, HASH_EXTENT_BYTES, HashMark } from '../../core/stream/index.ts'
import type { ExtentHashes } from '../../core/stream/index.ts'
import type { SlabPool } from '../buffer/index.ts'
import type { HashSource } from './hash-source.ts'
import type { RaceGuard, Span } from './race-guard.ts'

const READ_BYTES = 1024 * 1024
const WINDOW_EXTENTS = 256
const WINDOW_BYTES = WINDOW_EXTENTS * HASH_EXTENT_BYTES
/** Windows whose hashes are asked for ahead of the reads. */
const WINDOWS_AHEAD = 3
/** A position is renewed after so long, so that promotion at the agent need not wait for it. */
const RENEW_MS = 30_000
/** Extents hashed before the guest's own requests are looked at again. */
const EXTENTS_PER_TURN = 4
const NOT_HELD_ATTEMPTS = 20
const BASE_ALLOCATION = 'base:allocation'
const STATE_ZERO = 2
const ZEROES = Buffer.alloc(HASH_EXTENT_BYTES)

/** A range of bytes on the disk. */
export type Range = { offsetBytes: number; lengthBytes: number }

/** What differs between source and replica; called in the turn in which the read leaves the race guard. */
export type DifferenceSink = {
  /** The source reads as zeroes there, the replica does not. `spans`: what no live write has touched since. */
  zeroes(range: Range, spans: readonly Span[]): void
  /** `different` lie within `read`, whose data begin at `slab`'s first byte. True: the slab was taken. */
  data(read: Range, slab: Buffer, different: readonly Range[], spans: readonly Span[]): boolean
}

export type CompareOptions = {
  disk: { disk: number; sizeBytes: number }
  client: NbdClient
  guard: RaceGuard
  slabs: SlabPool
  hashes: HashSource
  sink: DifferenceSink
  /** Resolves when `lengthBytes` more may be read. */
  admit: (lengthBytes: number, signal: AbortSignal) => Promise<void>
  /** So much was read; below `comparedToBytes` nothing is under way any more. */
  onProgress: (readBytes: number, comparedToBytes: number) => void
  readsInFlight: number
  signal: AbortSignal
  /** The agent fails or does not answer: false throws; true calls the rest of the scan different, so that a sync comes to its end as a full copy. */
  differsIfUnanswered: boolean
  /** True: what is below counts as not looked at, and the scan ends early. */
  isEnough?: () => boolean
}

type Window = Range & { answer: Promise<ExtentHashes> }

/**
 * Compares a range of a disk with what the agent holds of it, by hash (docs/decisions/delta-sync.md): asks for the marks of a window ahead, reads what is not
 * zero on the source, and tells what differs while the read is still registered with the race guard.
 */
export class CompareScan {
  readonly #options: CompareOptions
  readonly #inFlight = new Set<{ offsetBytes: number; done: Promise<void> }>()
  #failed: { error: unknown } | undefined
  #scannedToBytes = 0
  #asOfSeq = -1
  #asOfMs = 0
  #isUnanswered = false

  constructor(options: CompareOptions) {
    this.#options = options
  }

  /**
   * @returns the offset up to which everything was compared: `endBytes`, or less if the sink had enough
   * @throws what the NBD client and the hash source throw, or the signal's reason
   */
  async run(startBytes: number, endBytes: number): Promise<number> {
    const windows: Window[] = []
    let askedToBytes = startBytes
    this.#scannedToBytes = startBytes
    try {
      while (this.#scannedToBytes < endBytes && this.#options.isEnough?.() !== true) {
        while (windows.length < WINDOWS_AHEAD && askedToBytes < endBytes) {
          const lengthBytes = Math.min(WINDOW_BYTES, endBytes - askedToBytes)
          const answer = this.#ask(askedToBytes, lengthBytes)
          // Looked at when its turn comes.
          answer.catch(() => undefined)
          windows.push({ offsetBytes: askedToBytes, lengthBytes, answer })
          askedToBytes += lengthBytes
        }
        const window = windows.shift()
        if (window === undefined) break
        await this.#compare(window, await window.answer)
        this.#scannedToBytes = window.offsetBytes + window.lengthBytes
        this.#options.onProgress(0, this.#comparedToBytes())
      }
      while (this.#inFlight.size > 0) await this.#oneDone()
      this.#throwIfFailed()
      this.#options.onProgress(0, this.#scannedToBytes)
      return this.#scannedToBytes
    } catch (error) {
      // What is still being read must not become a record any more.
      this.#failed ??= { error }
      throw error
    }
  }

  async #ask(offsetBytes: number, lengthBytes: number): Promise<ExtentHashes> {
    const { hashes, disk, signal } = this.#options
    const extentCount = Math.ceil(lengthBytes / HASH_EXTENT_BYTES)
    const unknown = { marks: new Uint8Array(extentCount).fill(HashMark.unknown), hashes: Buffer.alloc(0) }
    for (let attempt = 1; !this.#isUnanswered; attempt++) {
      if (this.#asOfSeq < 0 || performance.now() - this.#asOfMs > RENEW_MS) {
        this.#asOfSeq = hashes.asOfSeq()
        this.#asOfMs = performance.now()
      }
      try {
        return await hashes.ask({ disk: disk.disk, asOfSeq: this.#asOfSeq, offsetBytes, extentBytes: HASH_EXTENT_BYTES, extentCount }, signal)
      } catch (error) {
        // Not even the index of the range can be read: all of it differs, and a sync heals it.
        if (errorCode(error) === 'JOURNAL_DAMAGED') return unknown
        if (errorCode(error) === 'NOT_FOUND' && attempt < NOT_HELD_ATTEMPTS) {
          this.#asOfSeq = -1
          continue
        }
        if (signal.aborted || !this.#options.differsIfUnanswered) throw error
        this.#isUnanswered = true
      }
    }
    return unknown
  }

  async #compare(window: Window, answer: ExtentHashes): Promise<void> {
    const { marks } = answer
    if (marks.length !== Math.ceil(window.lengthBytes / HASH_EXTENT_BYTES)) throw new CdpError('STREAM_PROTOCOL', 'the agent answered for another number of extents')
    const hashAt = placesOfHashes(marks)
    const isZero = await this.#settleZeroes(window, marks)
    const perRead = READ_BYTES / HASH_EXTENT_BYTES
    for (let first = 0; first < marks.length; ) {
      if (isZero[first]) {
        first++
        continue
      }
      let end = first + 1
      while (end < marks.length && end - first < perRead && !isZero[end]) end++
      const offsetBytes = window.offsetBytes + first * HASH_EXTENT_BYTES
      const lengthBytes = Math.min(window.offsetBytes + window.lengthBytes, window.offsetBytes + end * HASH_EXTENT_BYTES) - offsetBytes
      await this.#begin({ offsetBytes, lengthBytes }, marks.subarray(first, end), hashAt.subarray(first, end), answer.hashes)
      first = end
    }
  }

  /** Extents that the export calls zeroes are settled here, without being read. @returns one flag an extent */
  async #settleZeroes(window: Window, marks: Uint8Array): Promise<Uint8Array> {
    const { client, guard, disk, sink, signal } = this.#options
    const { offsetBytes, lengthBytes } = window
    signal.throwIfAborted()
    this.#throwIfFailed()
    const read = guard.register(disk.disk, offsetBytes, lengthBytes)
    let spans: Span[] = []
    const status = await client.blockStatus(offsetBytes, lengthBytes, signal).finally(() => (spans = read.take()))
    const isZero = new Uint8Array(marks.length)
    let at = 0
    for (const { lengthBytes: bytes, flags } of status.get(BASE_ALLOCATION) ?? []) {
      const end = Math.min(lengthBytes, at + bytes)
      const last = end === lengthBytes ? marks.length : Math.floor(end / HASH_EXTENT_BYTES)
      if ((flags & STATE_ZERO) !== 0) {
        for (let extent = Math.ceil(at / HASH_EXTENT_BYTES); extent < last; extent++) {
          isZero[extent] = 1
          if (marks[extent] === HashMark.zero) continue
          const from = offsetBytes + extent * HASH_EXTENT_BYTES
          sink.zeroes({ offsetBytes: from, lengthBytes: Math.min(HASH_EXTENT_BYTES, offsetBytes + lengthBytes - from) }, spans)
        }
      }
      at = end
    }
    return isZero
  }

  /** Begins a read, as soon as there is room for it. */
  async #begin(range: Range, marks: Uint8Array, hashAt: Int32Array, hashes: Buffer): Promise<void> {
    const { admit, readsInFlight, signal } = this.#options
    while (this.#inFlight.size >= readsInFlight) await this.#oneDone()
    await admit(range.lengthBytes, signal)
    this.#throwIfFailed()
    const entry = { offsetBytes: range.offsetBytes, done: Promise.resolve() }
    entry.done = this.#read(range, marks, hashAt, hashes).then(
      () => void this.#inFlight.delete(entry),
      (error: unknown) => {
        this.#inFlight.delete(entry)
        this.#failed ??= { error }
      },
    )
    this.#inFlight.add(entry)
    this.#scannedToBytes = range.offsetBytes + range.lengthBytes
  }

  async #read(range: Range, marks: Uint8Array, hashAt: Int32Array, hashes: Buffer): Promise<void> {
    const { client, guard, disk, sink, slabs, signal } = this.#options
    const { offsetBytes, lengthBytes } = range
    const slab = slabs.take()
    const read = guard.register(disk.disk, offsetBytes, lengthBytes)
    const different: Range[] = []
    let spans: Span[]
    try {
      await client.readInto(slab, 0, offsetBytes, lengthBytes, signal)
      for (let extent = 0; extent < marks.length; extent++) {
        if (extent > 0 && extent % EXTENTS_PER_TURN === 0) await turn()
        const start = extent * HASH_EXTENT_BYTES
        const bytes = slab.subarray(start, Math.min(lengthBytes, start + HASH_EXTENT_BYTES))
        if (isSame(bytes, marks[extent], hashes, hashAt[extent])) continue
        const last = different.at(-1)
        if (last !== undefined && last.offsetBytes + last.lengthBytes === offsetBytes + start) last.lengthBytes += bytes.length
        else different.push({ offsetBytes: offsetBytes + start, lengthBytes: bytes.length })
      }
    } finally {
      spans = read.take()
    }
    signal.throwIfAborted()
    this.#throwIfFailed()
    const isTaken = different.length > 0 && sink.data(range, slab, different, spans)
    if (!isTaken) slabs.give(slab)
    this.#options.onProgress(lengthBytes, this.#comparedToBytes())
  }

  async #oneDone(): Promise<void> {
    await Promise.race([...this.#inFlight].map(({ done }) => done))
  }

  /** Below this offset nothing is under way any more; a read that failed keeps it where it was. */
  #comparedToBytes(): number {
    if (this.#failed !== undefined) return 0
    let lowest = this.#scannedToBytes
    for (const { offsetBytes } of this.#inFlight) if (offsetBytes < lowest) lowest = offsetBytes
    return lowest
  }

  #throwIfFailed(): void {
    if (this.#failed !== undefined) throw this.#failed.error
  }
}

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))

const isSame = (bytes: Buffer, mark: number, hashes: Buffer, hashAt: number): boolean => {
  if (mark === HashMark.zero) return bytes.equals(ZEROES.subarray(0, bytes.length))
  return mark === HashMark.hash && hash('sha256', bytes, 'buffer').equals(hashes.subarray(hashAt, hashAt + HASH_BYTES))
}

/** Where the hash of each extent begins. */
const placesOfHashes = (marks: Uint8Array): Int32Array => {
  const places = new Int32Array(marks.length)
  let at = 0
  for (let extent = 0; extent < marks.length; extent++) {
    places[extent] = at
    if (marks[extent] === HashMark.hash) at += HASH_BYTES
  }
  return places
}
