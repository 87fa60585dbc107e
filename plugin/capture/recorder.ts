import { CdpError } from '../../core/errors/index.ts'
import { FLAG_DIRECT, FrameBuilder, RecordKind, alignToSector } from '../../core/record/index.ts'
import type { SlabPool } from '../buffer/index.ts'
import type { FrameQueue, SpillingQueue } from '../buffer/index.ts'
import type { FrameSealer, Sealed } from './frame-sealer.ts'

export type RecorderOptions = {
  queue: Pick<FrameQueue | SpillingQueue, 'push' | 'clear'>
  /** One for small-record frames, and one for the payload of a single large write or sync read. */
  smallSlabs: SlabPool
  largeSlabs: SlabPool
  sealer: FrameSealer
  nowUnixMs: () => number
  /** How long a record may wait for company before its frame is closed. */
  lingerMs: number
}

/** A builder that is full or was closed, with what its header will say. */
type Closed = { builder: FrameBuilder; pool: SlabPool; slabBytes: number; firstSeq: number; flags: number; atUnixMs: number }

const RECORDS_PER_FRAME = 4096
const MAX_SPARE_BUILDERS = 8
const SEAL_TURN_MS = 1
/** Larger writes get a frame of their own: their payload is not copied again. */
export const LARGE_WRITE_BYTES = 128 * 1024

/**
 * Gives each captured operation its sequence and its place in a frame. Sealing (compression, checksums) is put off until the
 * acknowledgements of the present batch are out, and is the sealer's work. The order of calls is the order of the journal.
 */
export class Recorder {
  readonly #options: RecorderOptions
  readonly #spare: FrameBuilder[] = []
  #open: FrameBuilder
  #openFlags = 0
  #openFirstSeq = 1
  #openAtUnixMs = 0
  #lastSeq = 0
  #epoch = 0
  #direct = false
  /** What is written now is a copy of a disk's content, not a write of its guest. */
  copying = false
  #closed: Closed[] = []
  #closedBytes = 0
  /** Frames that were given to the sealer before this number last grew are dropped when they come back. */
  #generation = 0
  #sealSoon: NodeJS.Immediate | undefined
  #linger: NodeJS.Timeout | undefined

  constructor(options: RecorderOptions) {
    this.#options = options
    this.#open = new FrameBuilder(options.smallSlabs.take(), RECORDS_PER_FRAME)
  }

  /** Sequence of the newest record; 0 before the first. */
  get lastSeq(): number {
    return this.#lastSeq
  }

  get epoch(): number {
    return this.#epoch
  }

  /** Bytes of slabs that are filled and not sealed yet. */
  get unsealedBytes(): number {
    return this.#closedBytes + this.#open.payloadBytes
  }

  /** Begins an attach: what was not sealed is dropped (it was never promised to anybody). */
  begin(epoch: number, lastSeq: number, direct: boolean): void {
    this.#dropUnsealed()
    this.#epoch = epoch
    this.#lastSeq = lastSeq
    this.#direct = direct
    this.copying = false
    this.#options.queue.clear(lastSeq)
  }

  /** The initial sync has ended: frames from here on are journaled. */
  endDirect(): void {
    this.#close()
    this.#direct = false
  }

  /** A write whose payload lies whole in `chunk`; it is copied. */
  write(disk: number, offsetBytes: number, chunk: Buffer, start: number, end: number): void {
    const lengthBytes = end - start
    const at = this.#builderFor(lengthBytes).reserveData(this.copying ? RecordKind.sync : RecordKind.write, disk, offsetBytes, lengthBytes)
    chunk.copy(this.#open.payload, at, start, end)
    this.#lastSeq++
  }

  /** Data whose payload fills a slab of the large pool from its first byte on; the slab passes to the recorder. */
  takeLarge(kind: typeof RecordKind.write | typeof RecordKind.sync, disk: number, offsetBytes: number, lengthBytes: number, slab: Buffer): void {
    this.#close()
    const builder = new FrameBuilder(slab, 1)
    builder.reserveData(this.copying ? RecordKind.sync : kind, disk, offsetBytes, lengthBytes)
    this.#lastSeq++
    this.#enqueue({ builder, pool: this.#options.largeSlabs, slabBytes: slab.length, firstSeq: this.#lastSeq, flags: this.#flags(), atUnixMs: this.#options.nowUnixMs() })
  }

  /** Data read by a sync; copied. */
  sync(disk: number, offsetBytes: number, data: Buffer, start: number, end: number): void {
    const lengthBytes = end - start
    const at = this.#builderFor(lengthBytes).reserveData(RecordKind.sync, disk, offsetBytes, lengthBytes)
    data.copy(this.#open.payload, at, start, end)
    this.#lastSeq++
  }

  /** A record without data. */
  range(kind: RecordKind, disk: number, offsetBytes: number, lengthBytes: number): void {
    this.#builderFor(0).addRange(this.copying && kind === RecordKind.zero ? RecordKind.syncZero : kind, disk, offsetBytes, lengthBytes)
    this.#lastSeq++
  }

  /** A record that carries JSON. @throws CdpError BAD_INPUT for one that no frame has room for; nothing was recorded then */
  mark(kind: RecordKind, offsetBytes: number, value: unknown): void {
    const text = JSON.stringify(value)
    const textBytes = Buffer.byteLength(text)
    const { slabBytes } = this.#options.smallSlabs
    if (textBytes > slabBytes) throw new CdpError('BAD_INPUT', 'a mark is too large for the journal', { context: { kind, textBytes, slabBytes } })
    this.#builderFor(textBytes).addJson(kind, offsetBytes, text)
    this.#lastSeq++
  }

  /** Closes the open frame and has everything sealed now: nothing waits for a later turn. */
  flush(): void {
    this.#close()
    while (this.#closed.length > 0) this.#sealOne()
  }

  /** Nothing that is not sealed will be: the end, or a sealer that lost what it had. */
  dispose(): void {
    this.#dropUnsealed()
  }

  #flags(): number {
    return this.#direct ? FLAG_DIRECT : 0
  }

  #builderFor(dataBytes: number): FrameBuilder {
    if (!this.#open.fits(dataBytes)) this.#close()
    if (this.#open.recordCount === 0) {
      this.#openFirstSeq = this.#lastSeq + 1
      this.#openFlags = this.#flags()
      this.#openAtUnixMs = this.#options.nowUnixMs()
      this.#linger ??= setTimeout(() => {
        this.#linger = undefined
        this.#close()
      }, this.#options.lingerMs)
    }
    return this.#open
  }

  #close(): void {
    if (this.#open.recordCount === 0) return
    const { smallSlabs } = this.#options
    this.#enqueue({ builder: this.#open, pool: smallSlabs, slabBytes: smallSlabs.slabBytes, firstSeq: this.#openFirstSeq, flags: this.#openFlags, atUnixMs: this.#openAtUnixMs })
    this.#open = this.#spare.pop() ?? new FrameBuilder(smallSlabs.take(), RECORDS_PER_FRAME)
  }

  #enqueue(closed: Closed): void {
    this.#closed.push(closed)
    this.#closedBytes += closed.slabBytes
    this.#sealSoon ??= setImmediate(() => this.#sealSome())
  }

  /** Seals for a short while and leaves the rest to later turns, so that acknowledgements do not wait for it. */
  #sealSome(): void {
    const endMs = performance.now() + SEAL_TURN_MS
    this.#sealSoon = undefined
    do this.#sealOne()
    while (this.#closed.length > 0 && performance.now() < endMs)
    if (this.#closed.length > 0) this.#sealSoon ??= setImmediate(() => this.#sealSome())
  }

  #sealOne(): void {
    const closed = this.#closed.shift()
    if (closed === undefined) return
    const { builder, firstSeq, flags, atUnixMs } = closed
    const generation = this.#generation
    this.#options.sealer.seal(builder, { firstSeq, epoch: this.#epoch, atUnixMs, flags }, (sealed) => {
      if (generation === this.#generation) this.#enqueueSealed(closed, sealed)
    })
  }

  #enqueueSealed({ builder, pool, slabBytes }: Closed, { keepsSlab, ...frame }: Sealed): void {
    this.#closedBytes -= slabBytes
    const slab = builder.payload
    if (pool === this.#options.smallSlabs) {
      builder.reset(keepsSlab ? pool.take() : slab)
      if (this.#spare.length < MAX_SPARE_BUILDERS) this.#spare.push(builder)
    } else if (!keepsSlab) {
      pool.give(slab)
    }
    this.#options.queue.push(keepsSlab ? { ...frame, slab, pool } : frame)
  }

  #dropUnsealed(): void {
    clearTimeout(this.#linger)
    clearImmediate(this.#sealSoon)
    this.#linger = undefined
    this.#sealSoon = undefined
    this.#closed = []
    this.#closedBytes = 0
    this.#generation++
    this.#open.reset()
  }
}

/** True if a write of that many bytes is worth a slab of its own. */
export const isLargeWrite = (lengthBytes: number): boolean => alignToSector(lengthBytes) >= LARGE_WRITE_BYTES
