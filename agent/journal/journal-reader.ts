import type { FileHandle } from 'node:fs/promises'
import { CdpError, errorCode, errorMessage } from '../../core/errors/index.ts'
import { decodeFramePayload, FRAME_HEADER_BYTES, parseFrame, parseFrameHeader } from '../../core/record/index.ts'
import type { FrameHeader, RecordTable } from '../../core/record/index.ts'
import { SEGMENT_HEADER_BYTES } from '../index/index.ts'
import { marksOf } from './frame-checks.ts'
import type { JournalMark } from './frame-checks.ts'
import { scanFrames } from './frame-scan.ts'
import type { BadStretch } from './frame-scan.ts'
import { ReadHandles } from './read-handles.ts'
import type { Damage, DamageList, SegmentInfo } from './segment-info.ts'

/** A frame of the journal, checked, with its payload decompressed. */
export type StoredFrame = { header: FrameHeader; table: RecordTable; payload: Buffer }

/** Header and table of a frame of the journal; views, valid until the next one is asked for. */
export type FrameRecords = { frameOffset: number; header: FrameHeader; table: RecordTable }

const FIRST_READ_BYTES = 64 * 1024

const readFully = async (handle: FileHandle, target: Buffer, offsetBytes: number): Promise<number> => {
  let done = 0
  while (done < target.length) {
    const { bytesRead } = await handle.read(target, done, target.length - done, offsetBytes + done)
    if (bytesRead === 0) break
    done += bytesRead
  }
  return done
}

/** Reads frames of closed and open segments; whatever does not match its checksum is noted as damage and never returned. */
export class JournalReader implements AsyncDisposable {
  readonly #segments: readonly SegmentInfo[]
  readonly #damage: DamageList
  readonly #handles: ReadHandles

  constructor(segments: readonly SegmentInfo[], damage: DamageList, maxOpenFiles?: number) {
    this.#segments = segments
    this.#damage = damage
    this.#handles = new ReadHandles(maxOpenFiles)
  }

  /** @throws CdpError NOT_FOUND */
  segment(segmentNumber: number): SegmentInfo {
    const first = this.#segments.at(0)
    const info = first === undefined ? undefined : this.#segments.at(Math.max(0, segmentNumber - first.segmentNumber))
    if (info?.segmentNumber !== segmentNumber) throw new CdpError('NOT_FOUND', 'no such segment', { context: { segment: segmentNumber } })
    return info
  }

  /** A segment's file was removed. */
  forget(path: string): Promise<void> {
    return this.#handles.forget(path)
  }

  /**
   * The frame at `frameOffset` of a segment.
   * @throws CdpError NOT_FOUND outside what is durable, JOURNAL_DAMAGED (context: firstSeq, lastSeq) if it is not as it was written
   */
  async readFrame(segmentNumber: number, frameOffset: number): Promise<StoredFrame> {
    const info = this.segment(segmentNumber)
    if (frameOffset < SEGMENT_HEADER_BYTES || frameOffset + FRAME_HEADER_BYTES > info.framesEndBytes) {
      throw new CdpError('NOT_FOUND', 'no frame there', { context: { segment: segmentNumber, frameOffset } })
    }
    const handle = await this.#handles.acquire(info.path)
    try {
      return await this.#read(handle, info, frameOffset)
    } catch (cause) {
      throw await this.#damaged(info, frameOffset, cause)
    } finally {
      await this.#handles.release(info.path)
    }
  }

  /**
   * Headers and tables of every frame of a segment that has a record in [fromSeq, toSeq], in order, each fully checked.
   * @throws CdpError JOURNAL_DAMAGED when the first damaged stretch in that range is reached
   */
  async *recordsOf(segmentNumber: number, range: { fromSeq?: number; toSeq?: number } = {}): AsyncGenerator<FrameRecords, void, undefined> {
    const info = this.segment(segmentNumber)
    const fromSeq = range.fromSeq ?? info.firstSeq
    const toSeq = Math.min(range.toSeq ?? info.lastSeq, info.lastSeq)
    if (toSeq < info.firstSeq || toSeq < fromSeq) return
    const handle = await this.#handles.acquire(info.path)
    try {
      const scan = { fromBytes: SEGMENT_HEADER_BYTES, toBytes: info.framesEndBytes, expectedSeq: info.firstSeq, lastSeq: info.lastSeq }
      for await (const event of scanFrames(handle, scan)) {
        if (event.is === 'bad') {
          const damage = this.#note(info, event.bad.firstSeq, event.bad.lastSeq ?? info.lastSeq, event.bad.what)
          if (damage.firstSeq > toSeq) return
          if (damage.lastSeq >= fromSeq) throw damagedError(damage)
          continue
        }
        const { header, table } = event.frame
        if (header.firstSeq > toSeq) return
        if (header.lastSeq >= fromSeq) yield { frameOffset: event.offsetBytes, header, table }
      }
    } finally {
      await this.#handles.release(info.path)
    }
  }

  /** Every mark of the journal from `fromSeq` on, in order. Damage is noted and stepped over: what a damaged frame held is lost. */
  async *marks(fromSeq = 0): AsyncGenerator<JournalMark, void, undefined> {
    for (const info of [...this.#segments]) {
      if (info.lastSeq < fromSeq || info.lastSeq < info.firstSeq) continue
      let readSeq = info.firstSeq - 1
      const handle = await this.#handles.acquire(info.path)
      try {
        const scan = { fromBytes: SEGMENT_HEADER_BYTES, toBytes: info.framesEndBytes, expectedSeq: info.firstSeq, lastSeq: info.lastSeq }
        for await (const event of scanFrames(handle, scan)) {
          if (event.is === 'bad') this.#note(info, event.bad.firstSeq, event.bad.lastSeq ?? info.lastSeq, event.bad.what)
          else for (const mark of marksOf(event.frame) ?? []) if (mark.seq >= fromSeq) yield mark
          readSeq = event.is === 'bad' ? (event.bad.lastSeq ?? info.lastSeq) : event.frame.header.lastSeq
        }
      } catch (error) {
        if (errorCode(error) !== 'EIO') throw error
        this.#note(info, readSeq + 1, info.lastSeq, 'cannot be read')
      } finally {
        await this.#handles.release(info.path)
      }
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#handles[Symbol.asyncDispose]()
  }

  async #read(handle: FileHandle, info: SegmentInfo, frameOffset: number): Promise<StoredFrame> {
    const first = Buffer.allocUnsafe(Math.min(FIRST_READ_BYTES, info.framesEndBytes - frameOffset))
    const firstBytes = await readFully(handle, first, frameOffset)
    const header = parseFrameHeader(first.subarray(0, firstBytes))
    const frameBytes = FRAME_HEADER_BYTES + header.bodyBytes
    if (header.firstSeq < info.firstSeq || header.lastSeq > info.lastSeq) throw new CdpError('FORMAT', 'frame that does not belong into its segment')
    let bytes = first
    if (frameBytes > firstBytes) {
      bytes = Buffer.allocUnsafe(frameBytes)
      first.copy(bytes, 0, 0, firstBytes)
      await readFully(handle, bytes.subarray(firstBytes), frameOffset + firstBytes)
    }
    const frame = parseFrame(bytes)
    return { header: frame.header, table: frame.table, payload: decodeFramePayload(frame.header, frame.stored) }
  }

  /** Which sequences a broken frame held is known from its neighbours. */
  async #damaged(info: SegmentInfo, frameOffset: number, cause: unknown): Promise<CdpError> {
    if (!this.#segments.includes(info)) return new CdpError('NOT_FOUND', 'the segment went into the mirror', { cause, context: { segment: info.segmentNumber } })
    let bad: BadStretch | undefined
    try {
      const handle = await this.#handles.acquire(info.path)
      try {
        const scan = { fromBytes: SEGMENT_HEADER_BYTES, toBytes: info.framesEndBytes, expectedSeq: info.firstSeq, lastSeq: info.lastSeq }
        for await (const event of scanFrames(handle, scan)) {
          const startBytes = event.is === 'bad' ? event.bad.offsetBytes : event.offsetBytes
          if (startBytes > frameOffset) break
          bad = event.is === 'bad' ? event.bad : undefined
          if (event.is === 'frame' && startBytes === frameOffset) return new CdpError('IO', 'a frame could not be read, and then it could', { cause, retry: true })
        }
      } finally {
        await this.#handles.release(info.path)
      }
    } catch (error) {
      return damagedError(this.#note(info, info.firstSeq, info.lastSeq, `cannot be read: ${errorMessage(error)}`), cause)
    }
    // Inside a whole frame: the caller's position is wrong.
    if (bad === undefined) return new CdpError('NOT_FOUND', 'no frame begins there', { cause, context: { segment: info.segmentNumber, frameOffset } })
    const place = { firstSeq: bad.firstSeq, lastSeq: bad.lastSeq ?? info.lastSeq }
    return damagedError(this.#note(info, place.firstSeq, place.lastSeq, errorMessage(cause)), cause)
  }

  #note(info: SegmentInfo, firstSeq: number, lastSeq: number, what: string): Damage {
    const damage = { segment: info.segmentNumber, firstSeq, lastSeq, what }
    this.#damage.add(damage)
    return damage
  }
}

const damagedError = (damage: Damage, cause?: unknown): CdpError =>
  new CdpError('JOURNAL_DAMAGED', `sequences ${damage.firstSeq} to ${damage.lastSeq} of the journal are damaged: ${damage.what}`, {
    cause,
    hint: 'Recovery points that need them are refused; choose one before them, or let a sync begin a new history.',
    context: { segment: damage.segment, firstSeq: damage.firstSeq, lastSeq: damage.lastSeq },
  })
