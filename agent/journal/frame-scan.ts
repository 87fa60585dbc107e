import type { FileHandle } from 'node:fs/promises'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { FRAME_HEADER_BYTES, FRAME_MAGIC, MAX_FRAME_BYTES, parseFrame, parseFrameHeader } from '../../core/record/index.ts'
import type { Frame, FrameHeader } from '../../core/record/index.ts'

/** Frames of a segment between two offsets. */
export type ScanRange = {
  fromBytes: number
  /** Where reading must stop; frames never go beyond. */
  toBytes: number
  /** The sequence that the first frame must begin with. */
  expectedSeq: number
  /** The last sequence, where it is known (sealed, or followed by another segment): needed to go on behind damage. */
  lastSeq?: number
}

/** A stretch that cannot be believed. With `lastSeq` unknown, nothing behind it was found. */
export type BadStretch = { offsetBytes: number; firstSeq: number; lastSeq: number | undefined; what: string }

export type ScanEvent =
  | { is: 'frame'; frame: Frame; /** The frame's bytes. */ bytes: Buffer; offsetBytes: number }
  | { is: 'bad'; bad: BadStretch }

/** What is read at once, at most. */
export const SCAN_WINDOW_BYTES = 2 * MAX_FRAME_BYTES
const MAGIC_BYTES = Buffer.alloc(4)
MAGIC_BYTES.writeUInt32LE(FRAME_MAGIC)
/** First page of a run: a leaf, or the header page if it is empty. */
const RUN_MAGIC_BYTES = [Buffer.from('CDPL'), Buffer.from('CDPR')]

/** Reads a file through one buffer. Views are valid until the next call. */
class Window {
  readonly #handle: FileHandle
  readonly #buffer: Buffer
  #startBytes = 0
  #endBytes = 0

  constructor(handle: FileHandle, buffer: Buffer) {
    this.#handle = handle
    this.#buffer = buffer
  }

  /** A view of `lengthBytes` at `offsetBytes`; shorter only where the file ends. */
  async view(offsetBytes: number, lengthBytes: number, limitBytes: number): Promise<Buffer> {
    const wantedEnd = Math.min(offsetBytes + lengthBytes, limitBytes)
    if (offsetBytes < this.#startBytes || wantedEnd > this.#endBytes) await this.#fill(offsetBytes, limitBytes)
    const start = offsetBytes - this.#startBytes
    return this.#buffer.subarray(start, Math.max(start, Math.min(wantedEnd, this.#endBytes) - this.#startBytes))
  }

  async #fill(offsetBytes: number, limitBytes: number): Promise<void> {
    const wanted = Math.max(0, Math.min(this.#buffer.length, limitBytes - offsetBytes))
    let filled = 0
    this.#startBytes = offsetBytes
    this.#endBytes = offsetBytes
    while (filled < wanted) {
      const { bytesRead } = await this.#handle.read(this.#buffer, filled, wanted - filled, offsetBytes + filled)
      if (bytesRead === 0) break
      filled += bytesRead
    }
    this.#endBytes = offsetBytes + filled
  }
}

const headerAt = async (window: Window, offsetBytes: number, limitBytes: number): Promise<FrameHeader | CdpError> => {
  try {
    return parseFrameHeader(await window.view(offsetBytes, FRAME_HEADER_BYTES, limitBytes))
  } catch (error) {
    if (error instanceof CdpError) return error
    throw error
  }
}

/** Frames end with the range, or where an index run begins that a sealing left behind. */
const framesEndAt = async (window: Window, offsetBytes: number, toBytes: number): Promise<boolean> => {
  if (offsetBytes === toBytes) return true
  const next = await window.view(offsetBytes, RUN_MAGIC_BYTES[0].length, toBytes)
  return RUN_MAGIC_BYTES.some((magic) => magic.equals(next))
}

/**
 * True if intact headers follow each other from here to `lastSeq` and the end of the frames. A guest's disk may hold anything,
 * frames of a journal too, so frames that look right prove nothing.
 */
const chainHolds = async (window: Window, first: FrameHeader, offsetBytes: number, toBytes: number, lastSeq: number): Promise<boolean> => {
  let header = first
  let at = offsetBytes
  for (;;) {
    at += FRAME_HEADER_BYTES + header.bodyBytes
    if (at > toBytes) return false
    if (header.lastSeq === lastSeq) return framesEndAt(window, at, toBytes)
    const next = await headerAt(window, at, toBytes)
    if (next instanceof CdpError || next.firstSeq !== header.lastSeq + 1 || next.lastSeq > lastSeq) return false
    header = next
  }
}

/** The next offset behind a broken header from which the frames go on to the known end, or undefined. */
const findNext = async (window: Window, range: ScanRange, fromBytes: number, afterSeq: number): Promise<{ offsetBytes: number; firstSeq: number } | undefined> => {
  if (range.lastSeq === undefined) return undefined
  let at = fromBytes
  while (at + FRAME_HEADER_BYTES <= range.toBytes) {
    const view = await window.view(at, MAX_FRAME_BYTES, range.toBytes)
    const found = view.indexOf(MAGIC_BYTES)
    if (found < 0) {
      if (view.length <= MAGIC_BYTES.length) return undefined
      at += view.length - (MAGIC_BYTES.length - 1)
      continue
    }
    at += found
    const header = await headerAt(window, at, range.toBytes)
    if (!(header instanceof CdpError) && header.firstSeq > afterSeq && header.lastSeq <= range.lastSeq && (await chainHolds(window, header, at, range.toBytes, range.lastSeq))) {
      return { offsetBytes: at, firstSeq: header.firstSeq }
    }
    at++
  }
  return undefined
}

/**
 * Every frame of a range, in order, each checked from magic to last table entry. What fails is named with its sequences and
 * stepped over, if the header says how long the frame is or the end of the range is known; else the scan ends there.
 * A frame is a view, valid until the next step.
 * @param buffer SCAN_WINDOW_BYTES to read into, for who scans one file after the other: new memory costs more than reading
 */
export async function* scanFrames(handle: FileHandle, range: ScanRange, buffer?: Buffer): AsyncGenerator<ScanEvent, void, undefined> {
  const window = new Window(handle, buffer ?? Buffer.allocUnsafeSlow(Math.min(SCAN_WINDOW_BYTES, Math.max(FRAME_HEADER_BYTES, range.toBytes - range.fromBytes))))
  let at = range.fromBytes
  let expectedSeq = range.expectedSeq
  while (at < range.toBytes && (range.lastSeq === undefined || expectedSeq <= range.lastSeq)) {
    const header = await headerAt(window, at, range.toBytes)
    const what = header instanceof CdpError ? header.message : header.firstSeq !== expectedSeq ? 'frame out of sequence' : undefined
    if (header instanceof CdpError || what !== undefined) {
      const next = await findNext(window, range, at, expectedSeq)
      const lastSeq = next === undefined ? range.lastSeq : next.firstSeq - 1
      yield { is: 'bad', bad: { offsetBytes: at, firstSeq: expectedSeq, lastSeq, what: what ?? 'frame header is broken' } }
      if (next === undefined) return
      at = next.offsetBytes
      expectedSeq = next.firstSeq
      continue
    }
    const lengthBytes = FRAME_HEADER_BYTES + header.bodyBytes
    let event: ScanEvent
    try {
      const bytes = await window.view(at, lengthBytes, range.toBytes)
      event = { is: 'frame', frame: parseFrame(bytes), bytes, offsetBytes: at }
    } catch (error) {
      if (!(error instanceof CdpError)) throw error
      event = { is: 'bad', bad: { offsetBytes: at, firstSeq: header.firstSeq, lastSeq: header.lastSeq, what: errorMessage(error) } }
    }
    yield event
    if (event.is === 'bad' && range.lastSeq === undefined) return
    at += lengthBytes
    expectedSeq = header.lastSeq + 1
  }
  if (range.lastSeq !== undefined && expectedSeq <= range.lastSeq) {
    yield { is: 'bad', bad: { offsetBytes: at, firstSeq: expectedSeq, lastSeq: range.lastSeq, what: 'the file ends too early' } }
  }
}
