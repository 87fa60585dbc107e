import { SECTOR_BYTES } from '../../core/record/index.ts'
import { NO_DATA, keyOfBytes, offsetOfKey } from './extent.ts'
import { ExtentCursor } from './extent-source.ts'
import type { ExtentSource } from './extent-source.ts'

/**
 * A part of a range and where its bytes are:
 * `data` in a frame of the journal, `zero` (it reads as zeroes), `base` (never touched since the base, so the mirror has it),
 * `promoted` (its segment is gone, so the mirror has it).
 */
export type Piece = {
  offsetBytes: number
  lengthBytes: number
  from: 'data' | 'zero' | 'base' | 'promoted'
  segment: number
  frameOffset: number
  /** Where the piece begins in the frame's raw payload. */
  payloadOffset: number
}

const pieceOf = (startKey: number, endKey: number, from: Piece['from'], segment = 0, frameOffset = 0, sector = 0): Piece => ({
  offsetBytes: offsetOfKey(startKey), lengthBytes: (endKey - startKey) * SECTOR_BYTES, from, segment, frameOffset, payloadOffset: sector * SECTOR_BYTES,
})

const pieceAt = (cursor: ExtentCursor, startKey: number, endKey: number, floorSegment: number): Piece => {
  if (cursor.segment < floorSegment) return pieceOf(startKey, endKey, 'promoted')
  if (cursor.sector === NO_DATA) return pieceOf(startKey, endKey, 'zero', cursor.segment)
  return pieceOf(startKey, endKey, 'data', cursor.segment, cursor.frame, cursor.sector + (startKey - cursor.startKey))
}

/** An error of one source, so that the caller can do without that source. */
export class SourceFailure extends Error {
  readonly source: ExtentSource

  constructor(source: ExtentSource, cause: unknown) {
    super('an index source failed', { cause })
    this.source = source
  }
}

/** Brings the pages that a look-up of `key` needs into the cache, for all sources side by side. */
export const warm = async (sources: readonly ExtentSource[], key: number): Promise<void> => {
  const one = async (source: ExtentSource): Promise<void> => {
    const cursor = new ExtentCursor()
    while (!source.seek(cursor, key)) await source.load(cursor)
  }
  // What fails here fails again, and is dealt with, in the look-up that follows.
  await Promise.allSettled(sources.map(one))
}

export type ResolveOptions = {
  /** Segments before this one are gone: the mirror has what they held. */
  floorSegment: number
  /** Called once, when the first page turns out not to be in memory. */
  onFirstMiss?: (key: number) => Promise<void>
}

/**
 * Where the bytes of [offsetBytes, offsetBytes + lengthBytes) of a disk are. The first source that knows a sector wins;
 * sources come newest first. Pieces are sorted and cover the range without a gap. It waits only for pages not in memory.
 * @throws SourceFailure around what a source threw
 */
export const resolveRange = async (
  sources: readonly ExtentSource[], disk: number, offsetBytes: number, lengthBytes: number, options: ResolveOptions,
): Promise<Piece[]> => {
  const pieces: Piece[] = []
  const cursor = new ExtentCursor()
  const first = keyOfBytes(disk, offsetBytes)
  let gaps = [first, first + lengthBytes / SECTOR_BYTES]
  let missed = false

  for (const source of sources) {
    if (gaps.length === 0) break
    const left: number[] = []
    cursor.reset()
    for (let at = 0; at < gaps.length; at += 2) {
      const end = gaps[at + 1]
      let position = gaps[at]
      try {
        // An extent found for the gap before may reach into this one, or lie behind it.
        let ready = at > 0 && cursor.endKey > position
        while (position < end) {
          ready = ready || (cursor.endKey === position && cursor.startKey < position ? source.next(cursor) : source.seek(cursor, position))
          if (!ready) {
            if (!missed && options.onFirstMiss !== undefined) await options.onFirstMiss(position)
            missed = true
            while (!source.seek(cursor, position)) await source.load(cursor)
            ready = true
          }
          if (cursor.startKey >= end) {
            left.push(position, end)
            break
          }
          if (cursor.startKey > position) left.push(position, cursor.startKey)
          const from = Math.max(position, cursor.startKey)
          position = Math.min(end, cursor.endKey)
          pieces.push(pieceAt(cursor, from, position, options.floorSegment))
          ready = cursor.endKey > position
          if (missed && cursor.held.size > 8) cursor.held.clear()
        }
      } catch (cause) {
        throw new SourceFailure(source, cause)
      }
    }
    gaps = left
  }
  for (let at = 0; at < gaps.length; at += 2) pieces.push(pieceOf(gaps[at], gaps[at + 1], 'base'))
  if (pieces.length > 1) pieces.sort((a, b) => a.offsetBytes - b.offsetBytes)
  return pieces
}
