import { createHash } from 'node:crypto'
import { open } from 'node:fs/promises'
import { writeAll } from '../../core/files/index.ts'
import { buildLeafRun, encodeSegmentHeader, encodeSegmentTrailer, RecordList, SEGMENT_HEADER_BYTES, SEGMENT_TRAILER_BYTES } from '../index/index.ts'
import { scanFrames } from './frame-scan.ts'
import type { BadStretch } from './frame-scan.ts'

export type SealRequest = {
  path: string
  segmentNumber: number
  firstSeq: number
  lastSeq: number
  createdAtUnixMs: number
  vm: string
  framesEndBytes: number
  /** Digest of the segment before, zeroes if there is none or it is not sealed. */
  previousDigest: Uint8Array
}

export type SealedSegment = {
  digest: Uint8Array
  runBytes: number
  recordCount: number
  firstAtUnixMs: number
  lastAtUnixMs: number
  fileBytes: number
}

export type SealResult = { is: 'sealed'; sealed: SealedSegment } | { is: 'damaged'; bad: BadStretch[] }

/**
 * Seals a closed segment: checks every frame, then header with the hash chain, leaf run, trailer, each durable before the next.
 * The trailer is last, so an interrupted sealing is an unsealed segment and is done again from the start.
 * @param window SCAN_WINDOW_BYTES that nobody else uses meanwhile
 */
export const sealSegment = async (request: SealRequest, window: Buffer): Promise<SealResult> => {
  const handle = await open(request.path, 'r+')
  try {
    const headerBytes = Buffer.alloc(SEGMENT_HEADER_BYTES)
    await handle.read(headerBytes, 0, SEGMENT_HEADER_BYTES, 0)
    const { firstSeq, createdAtUnixMs, segmentNumber, vm } = request
    const newHeader = encodeSegmentHeader({ firstSeq, createdAtUnixMs, segmentNumber, vm, previousDigest: Buffer.from(request.previousDigest) })
    const hash = createHash('sha256').update(newHeader)
    const bad: BadStretch[] = []
    const records = new RecordList(request.segmentNumber, request.firstSeq, 4096)
    let recordCount = 0
    let firstAtUnixMs = 0
    let lastAtUnixMs = 0
    const range = { fromBytes: SEGMENT_HEADER_BYTES, toBytes: request.framesEndBytes, expectedSeq: request.firstSeq, lastSeq: request.lastSeq }
    for await (const event of scanFrames(handle, range, window)) {
      if (event.is === 'bad') {
        bad.push(event.bad)
        continue
      }
      const { header } = event.frame
      if (recordCount === 0) firstAtUnixMs = header.atUnixMs
      lastAtUnixMs = header.atUnixMs
      recordCount += header.recordCount
      hash.update(event.bytes)
      if (bad.length === 0) records.addFrame(event.frame.table, header.firstSeq, event.offsetBytes)
    }
    if (bad.length > 0) return { is: 'damaged', bad }
    const run = buildLeafRun(records)
    const digest = hash.digest()
    const runOffsetBytes = request.framesEndBytes
    await handle.truncate(runOffsetBytes)
    if (!newHeader.equals(headerBytes)) await handle.write(newHeader, 0, SEGMENT_HEADER_BYTES, 0)
    await writeAll(handle, [run], run.length, runOffsetBytes)
    await handle.datasync()
    const trailer = encodeSegmentTrailer({ lastSeq: request.lastSeq, runOffsetBytes, runBytes: run.length, recordCount, firstAtUnixMs, lastAtUnixMs, digest })
    await handle.write(trailer, 0, SEGMENT_TRAILER_BYTES, runOffsetBytes + run.length)
    await handle.sync()
    const fileBytes = runOffsetBytes + run.length + SEGMENT_TRAILER_BYTES
    return { is: 'sealed', sealed: { digest, runBytes: run.length, recordCount, firstAtUnixMs, lastAtUnixMs, fileBytes } }
  } finally {
    await handle.close()
  }
}
