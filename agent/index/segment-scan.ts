import { stat } from 'node:fs/promises'
import { FRAME_HEADER_BYTES, MAX_FRAME_BYTES, parseFrame, parseFrameHeader } from '../../core/record/index.ts'
import type { Frame } from '../../core/record/index.ts'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { FilePool } from './file-pool.ts'
import { RecordList } from './record-list.ts'
import { SEGMENT_HEADER_BYTES } from './segment-layout.ts'

const CHUNK_BYTES = 4 * 1024 * 1024

export type ScanTarget = { path: string; segment: number; firstSeq: number; /** The scan ends with the frame that holds this record. */ untilSeq: number }

const damaged = (target: ScanTarget, offsetBytes: number, nextSeq: number, cause: unknown): CdpError =>
  new CdpError('JOURNAL_DAMAGED', `segment ${target.segment} is damaged at byte ${offsetBytes}: ${errorMessage(cause)}`, {
    cause,
    hint: `recovery points from sequence ${nextSeq} on are affected; a sync heals the mirror for new ones`,
    context: { path: target.path, segment: target.segment, offsetBytes, fromSeq: nextSeq },
  })

/**
 * Reads the frames of a segment in order and checks all of them, up to the one that holds `untilSeq`.
 * `visit` gets views that are valid during the call only.
 * @throws CdpError JOURNAL_DAMAGED at a frame that is not what was written, NOT_FOUND if the segment ends before `untilSeq`
 */
export const scanFrames = async (files: FilePool, target: ScanTarget, visit: (frame: Frame, frameOffset: number) => void): Promise<void> => {
  const { size } = await stat(target.path)
  let buffer = Buffer.allocUnsafeSlow(Math.max(FRAME_HEADER_BYTES, Math.min(CHUNK_BYTES, size - SEGMENT_HEADER_BYTES)))
  let bufferAt = SEGMENT_HEADER_BYTES
  let bytes = await files.read(target.path, buffer, bufferAt)
  let at = 0
  let nextSeq = target.firstSeq
  while (nextSeq <= target.untilSeq) {
    let wanted = FRAME_HEADER_BYTES
    try {
      if (bytes - at >= FRAME_HEADER_BYTES) wanted += parseFrameHeader(buffer, at).bodyBytes
    } catch (cause) {
      throw damaged(target, bufferAt + at, nextSeq, cause)
    }
    if (bytes - at < wanted) {
      if (bytes < buffer.length) {
        throw new CdpError('NOT_FOUND', `the journal ends with sequence ${nextSeq - 1}, before ${target.untilSeq}`, { context: { segment: target.segment } })
      }
      const kept = bytes - at
      const next = wanted > buffer.length ? Buffer.allocUnsafeSlow(MAX_FRAME_BYTES) : buffer
      buffer.copy(next, 0, at, bytes)
      buffer = next
      bufferAt += at
      at = 0
      bytes = kept + (await files.read(target.path, buffer.subarray(kept), bufferAt + kept))
      continue
    }
    try {
      const frame = parseFrame(buffer, at)
      if (frame.header.firstSeq !== nextSeq) throw new CdpError('FORMAT', `a frame with sequence ${frame.header.firstSeq} stands where ${nextSeq} belongs`)
      visit(frame, bufferAt + at)
      nextSeq = frame.header.lastSeq + 1
    } catch (cause) {
      throw damaged(target, bufferAt + at, nextSeq, cause)
    }
    at += wanted
  }
}

/** The records of a segment up to `untilSeq`, from its frames: for a segment that is not sealed, is cut by a point, or has a damaged run. */
export const scanRecords = async (files: FilePool, target: ScanTarget): Promise<RecordList> => {
  const records = new RecordList(target.segment, target.firstSeq, 16_384)
  await scanFrames(files, target, (frame, frameOffset) => records.addFrame(frame.table, frame.header.firstSeq, frameOffset, target.untilSeq))
  return records
}
