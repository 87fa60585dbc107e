import { CdpError } from '../../core/errors/index.ts'
import { parseSegmentTrailer, SEGMENT_DIGEST_BYTES, SEGMENT_HEADER_BYTES, SEGMENT_TRAILER_BYTES } from '../index/index.ts'
import type { SegmentTrailer } from '../index/index.ts'

/** previousDigest of the first segment, and of one whose predecessor was not sealed. */
export const NO_DIGEST = Buffer.alloc(SEGMENT_DIGEST_BYTES)

/**
 * The trailer at the end of a file of `fileBytes`.
 * @throws CdpError FORMAT or CHECKSUM, also if it contradicts the size of its file
 */
export const trailerOfFile = (buffer: Buffer, fileBytes: number): SegmentTrailer => {
  const trailer = parseSegmentTrailer(buffer)
  if (
    trailer.runOffsetBytes < SEGMENT_HEADER_BYTES || trailer.runOffsetBytes + trailer.runBytes + SEGMENT_TRAILER_BYTES !== fileBytes ||
    !Number.isSafeInteger(trailer.lastSeq) || !Number.isSafeInteger(trailer.recordCount)
  ) {
    throw new CdpError('FORMAT', 'segment trailer contradicts its file', { context: { fileBytes, runOffsetBytes: trailer.runOffsetBytes } })
  }
  return trailer
}
