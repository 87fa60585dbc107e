import { createHash } from 'node:crypto'
import { open } from 'node:fs/promises'
import { crc32c } from '@node-rs/crc32'
import { CdpError } from '../../core/errors/index.ts'
import { parseSegmentHeader, SEGMENT_HEADER_BYTES, SEGMENT_TRAILER_BYTES } from '../index/index.ts'
import { scanFrames } from './frame-scan.ts'
import { NO_DIGEST, trailerOfFile } from './segment-ends.ts'

export type VerifyRequest = {
  path: string
  firstSeq: number
  lastSeq: number
  framesEndBytes: number
  sealed: boolean
  /** Digest of the segment before, if that one is sealed and still there. */
  previousDigest: Uint8Array | undefined
}

export type VerifiedSegment = { frames: number; records: number; readBytes: number; bad: { firstSeq: number; lastSeq: number; what: string }[] }

const PAGE_BYTES = 4096
const PAGE_CRC_OFFSET = 4092
const RUN_CHUNK_BYTES = 256 * PAGE_BYTES

const problemOf = (check: () => void): string | undefined => {
  try {
    check()
    return undefined
  } catch (error) {
    if (!(error instanceof CdpError)) throw error
    return error.message
  }
}

/** Reads a segment from its first to its last byte and names everything that is not as it was written. */
export const verifySegment = async (request: VerifyRequest): Promise<VerifiedSegment> => {
  const result: VerifiedSegment = { frames: 0, records: 0, readBytes: 0, bad: [] }
  const wholeSegment = (what: string): void => void result.bad.push({ firstSeq: request.firstSeq, lastSeq: request.lastSeq, what })
  const handle = await open(request.path, 'r')
  try {
    const head = Buffer.alloc(SEGMENT_HEADER_BYTES)
    await handle.read(head, 0, SEGMENT_HEADER_BYTES, 0)
    const headProblem = problemOf(() => {
      const { previousDigest } = parseSegmentHeader(head)
      const chained = request.previousDigest === undefined || !request.sealed || previousDigest.equals(request.previousDigest)
      if (!chained && !previousDigest.equals(NO_DIGEST)) throw new CdpError('CHECKSUM', 'the hash chain is broken: the segment before is not the one that was sealed')
    })
    if (headProblem !== undefined) wholeSegment(headProblem)
    const hash = createHash('sha256').update(head)
    const range = { fromBytes: SEGMENT_HEADER_BYTES, toBytes: request.framesEndBytes, expectedSeq: request.firstSeq, lastSeq: request.lastSeq }
    let endBytes = SEGMENT_HEADER_BYTES
    for await (const event of scanFrames(handle, range)) {
      if (event.is === 'bad') {
        result.bad.push({ firstSeq: event.bad.firstSeq, lastSeq: event.bad.lastSeq ?? request.lastSeq, what: event.bad.what })
        continue
      }
      hash.update(event.bytes)
      endBytes = event.offsetBytes + event.bytes.length
      result.frames++
      result.records += event.frame.header.recordCount
    }
    result.readBytes = endBytes
    if (!request.sealed) return result
    const fileBytes = (await handle.stat()).size
    const tail = Buffer.alloc(SEGMENT_TRAILER_BYTES)
    await handle.read(tail, 0, SEGMENT_TRAILER_BYTES, Math.max(0, fileBytes - SEGMENT_TRAILER_BYTES))
    const tailProblem = problemOf(() => {
      const trailer = trailerOfFile(tail, fileBytes)
      if (trailer.lastSeq !== request.lastSeq || trailer.runOffsetBytes !== request.framesEndBytes) throw new CdpError('FORMAT', 'segment trailer contradicts its frames')
      if (result.bad.length === 0 && !trailer.digest.equals(hash.digest())) throw new CdpError('CHECKSUM', 'the segment does not match its digest')
    })
    if (tailProblem !== undefined) wholeSegment(tailProblem)
    const runEndBytes = fileBytes - SEGMENT_TRAILER_BYTES
    const chunk = Buffer.alloc(Math.max(0, Math.min(RUN_CHUNK_BYTES, runEndBytes - request.framesEndBytes)))
    for (let at = request.framesEndBytes; at < runEndBytes; ) {
      const { bytesRead } = await handle.read(chunk, 0, Math.min(chunk.length, runEndBytes - at), at)
      if (bytesRead === 0 || bytesRead % PAGE_BYTES !== 0) {
        wholeSegment('the index run of the segment is not made of pages')
        break
      }
      for (let page = 0; page < bytesRead; page += PAGE_BYTES) {
        if (chunk.readUInt32LE(page + PAGE_CRC_OFFSET) !== crc32c(chunk.subarray(page, page + PAGE_CRC_OFFSET))) wholeSegment(`page ${(at - request.framesEndBytes + page) / PAGE_BYTES} of the index run is damaged`)
      }
      at += bytesRead
    }
    result.readBytes = fileBytes
    return result
  } finally {
    await handle.close()
  }
}
