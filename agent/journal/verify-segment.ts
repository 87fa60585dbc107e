import { createHash } from 'node:crypto'
import { open } from 'node:fs/promises'
import { setTimeout as delay } from 'node:timers/promises'
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
  /** How fast it is read; absent: as fast as the disk gives it. */
  rateBytesPerSec?: number
}

/** `frames`: what they held is lost, at `fromBytes` to `toBytes` where that is known. `header`, `index`: the frames are whole, and it can be made again from them. */
export type BadPart = { part: 'frames' | 'header' | 'index'; firstSeq: number; lastSeq: number; what: string; fromBytes?: number; toBytes?: number }
export type VerifiedSegment = { frames: number; records: number; readBytes: number; bad: BadPart[] }

const PAGE_BYTES = 4096
const PAGE_CRC_OFFSET = 4092
const RUN_CHUNK_BYTES = 256 * PAGE_BYTES
/** Waits are no shorter than reading so much takes. */
const PACE_BYTES = 1024 * 1024

/** Holds reading to a rate. */
const pacer = (rateBytesPerSec: number | undefined): ((bytes: number) => Promise<void>) => {
  let owedBytes = 0
  return async (bytes) => {
    owedBytes += bytes
    if (rateBytesPerSec === undefined || owedBytes < PACE_BYTES) return
    const waitMs = (owedBytes / rateBytesPerSec) * 1000
    owedBytes = 0
    await delay(waitMs)
  }
}

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
  const { firstSeq, lastSeq, framesEndBytes } = request
  const result: VerifiedSegment = { frames: 0, records: 0, readBytes: 0, bad: [] }
  const wholeSegment = (part: BadPart['part'], what: string): void => void result.bad.push({ part, firstSeq, lastSeq, what })
  const pace = pacer(request.rateBytesPerSec)
  const handle = await open(request.path, 'r')
  try {
    const head = Buffer.alloc(SEGMENT_HEADER_BYTES)
    await handle.read(head, 0, SEGMENT_HEADER_BYTES, 0)
    let previousDigest: Buffer | undefined
    const headProblem = problemOf(() => void ({ previousDigest } = parseSegmentHeader(head)))
    if (headProblem !== undefined) wholeSegment('header', headProblem)
    const isChained = previousDigest === undefined || request.previousDigest === undefined || !request.sealed || previousDigest.equals(NO_DIGEST) || previousDigest.equals(request.previousDigest)
    if (!isChained) wholeSegment('frames', 'the hash chain is broken: the segment before is not the one that was sealed')
    const hash = createHash('sha256').update(head)
    const range = { fromBytes: SEGMENT_HEADER_BYTES, toBytes: framesEndBytes, expectedSeq: firstSeq, lastSeq }
    let endBytes = SEGMENT_HEADER_BYTES
    let stretch: BadPart | undefined
    for await (const event of scanFrames(handle, range)) {
      const startBytes = event.is === 'bad' ? event.bad.offsetBytes : event.offsetBytes
      if (stretch !== undefined) stretch.toBytes = startBytes
      stretch = undefined
      if (event.is === 'bad') {
        stretch = { part: 'frames', firstSeq: event.bad.firstSeq, lastSeq: event.bad.lastSeq ?? lastSeq, what: event.bad.what, fromBytes: startBytes, toBytes: framesEndBytes }
        result.bad.push(stretch)
        continue
      }
      hash.update(event.bytes)
      await pace(startBytes + event.bytes.length - endBytes)
      endBytes = startBytes + event.bytes.length
      result.frames++
      result.records += event.frame.header.recordCount
    }
    result.readBytes = endBytes
    if (!request.sealed) return result
    const fileBytes = (await handle.stat()).size
    const tail = Buffer.alloc(SEGMENT_TRAILER_BYTES)
    await handle.read(tail, 0, SEGMENT_TRAILER_BYTES, Math.max(0, fileBytes - SEGMENT_TRAILER_BYTES))
    let digest: Buffer | undefined
    const tailProblem = problemOf(() => {
      const trailer = trailerOfFile(tail, fileBytes)
      if (trailer.lastSeq !== lastSeq || trailer.runOffsetBytes !== framesEndBytes) throw new CdpError('FORMAT', 'segment trailer contradicts its frames')
      digest = trailer.digest
    })
    if (tailProblem !== undefined) wholeSegment('index', tailProblem)
    if (result.bad.length === 0 && digest?.equals(hash.digest()) === false) wholeSegment('frames', 'the segment does not match its digest')
    const runEndBytes = fileBytes - SEGMENT_TRAILER_BYTES
    const chunk = Buffer.alloc(Math.max(0, Math.min(RUN_CHUNK_BYTES, runEndBytes - framesEndBytes)))
    for (let at = framesEndBytes; at < runEndBytes; ) {
      const { bytesRead } = await handle.read(chunk, 0, Math.min(chunk.length, runEndBytes - at), at)
      if (bytesRead === 0 || bytesRead % PAGE_BYTES !== 0) {
        wholeSegment('index', 'the index run of the segment is not made of pages')
        break
      }
      for (let page = 0; page < bytesRead; page += PAGE_BYTES) {
        if (chunk.readUInt32LE(page + PAGE_CRC_OFFSET) !== crc32c(chunk.subarray(page, page + PAGE_CRC_OFFSET))) wholeSegment('index', `page ${(at - framesEndBytes + page) / PAGE_BYTES} of the index run is damaged`)
      }
      at += bytesRead
      await pace(bytesRead)
    }
    result.readBytes = fileBytes
    return result
  } finally {
    await handle.close()
  }
}
