import { open } from 'node:fs/promises'
import { CdpError, errorCode, toCdpError } from '../../core/errors/index.ts'
import { decodeFramePayload, hasData, hasRange, MAX_FRAME_PAYLOAD_BYTES, RecordKind } from '../../core/record/index.ts'
import type { Frame, RecordTable } from '../../core/record/index.ts'
import { leafExtents, SEGMENT_HEADER_BYTES } from '../index/index.ts'
import type { FilePool, IndexView } from '../index/index.ts'
import { scanFrames } from './frame-scan.ts'
import type { PromotionTarget, Stretch } from './promotion-target.ts'
import type { Damage, DamageList } from './segment-info.ts'

/** Called with the bytes of journal read since the last call, before going on: throttles, and lets ingest go first. */
export type PromotionPace = (bytes: number, signal: AbortSignal) => Promise<void>

export type PromotionJob = {
  baseSeq: number
  targetSeq: number
  /** Those that hold (baseSeq, targetSeq], oldest first, as far as they were durable. */
  segments: readonly { segmentNumber: number; path: string; firstSeq: number; lastSeq: number; framesEndBytes: number }[]
  damage: DamageList
  totalBytes: number
  /** Damaged frames of this segment were passed over: the state at the target needs none of their data. */
  onPassed?: (segmentNumber: number, path: string) => void
}

/** What is copied out of frames before it is written; one frame's payload always fits. */
const BATCH_BYTES = 16 * 1024 * 1024
const BATCH_STRETCHES = 16_384

/** The first damaged sequence in (afterSeq, upToSeq] that the state at upToSeq may need. */
export const damageWithin = (damage: readonly Damage[], afterSeq: number, upToSeq: number): number | undefined => {
  let first: number | undefined
  for (const { firstSeq, lastSeq, healedFromSeq = Infinity } of damage) {
    if (lastSeq <= afterSeq || firstSeq > upToSeq || (healedFromSeq <= upToSeq && healedFromSeq < Infinity)) continue
    const seq = Math.max(firstSeq, afterSeq + 1)
    if (first === undefined || seq < first) first = seq
  }
  return first
}

/** Known, and written again by the target. */
const isHealed = (damage: readonly Damage[], firstSeq: number, lastSeq: number, targetSeq: number): boolean =>
  damage.some((one) => one.healedFromSeq !== undefined && one.healedFromSeq <= targetSeq && one.firstSeq <= firstSeq && one.lastSeq >= lastSeq)

/**
 * The frames with a record in (baseSeq, targetSeq], in order, each fully checked; views, valid until the next step.
 * @throws CdpError JOURNAL_DAMAGED at the first of them that is not as it was written, or missing; ABORTED
 */
async function* framesOf({ baseSeq, targetSeq, segments, damage, onPassed }: PromotionJob, signal: AbortSignal): AsyncGenerator<{ segmentNumber: number; offsetBytes: number; bytes: number; frame: Frame }, void, undefined> {
  const damaged = (segment: number, firstSeq: number, lastSeq: number, what: string): CdpError => {
    damage.add({ segment, firstSeq, lastSeq, what })
    return new CdpError('JOURNAL_DAMAGED', `sequences ${firstSeq} to ${lastSeq} of the journal are damaged: ${what}`, { context: { segment, firstSeq, lastSeq } })
  }
  let nextSeq = baseSeq + 1
  for (const { segmentNumber, path, firstSeq, lastSeq, framesEndBytes } of segments) {
    if (firstSeq > nextSeq) throw damaged(segmentNumber, nextSeq, firstSeq - 1, 'these records are missing')
    const handle = await open(path, 'r')
    const pass = (badFirstSeq: number, badLastSeq: number, what: string): void => {
      if (badLastSeq <= baseSeq) return
      if (!isHealed(damage.all(), badFirstSeq, badLastSeq, targetSeq)) throw damaged(segmentNumber, badFirstSeq, badLastSeq, what)
      onPassed?.(segmentNumber, path)
    }
    let readSeq = firstSeq - 1
    try {
      for await (const event of scanFrames(handle, { fromBytes: SEGMENT_HEADER_BYTES, toBytes: framesEndBytes, expectedSeq: firstSeq, lastSeq })) {
        if (signal.aborted) throw toCdpError(signal.reason, 'ABORTED')
        if (event.is === 'bad') {
          const { bad } = event
          if (bad.firstSeq > targetSeq) return
          readSeq = bad.lastSeq ?? lastSeq
          pass(bad.firstSeq, readSeq, bad.what)
          continue
        }
        if (event.frame.header.firstSeq > targetSeq) return
        readSeq = event.frame.header.lastSeq
        if (readSeq > baseSeq) yield { segmentNumber, offsetBytes: event.offsetBytes, bytes: event.bytes.length, frame: event.frame }
      }
    } catch (error) {
      // Where the disk gives nothing, nothing behind it is looked at.
      if (errorCode(error) !== 'EIO') throw error
      if (readSeq >= targetSeq) return
      pass(readSeq + 1, lastSeq, 'it cannot be read')
    } finally {
      await handle.close()
    }
    nextSeq = lastSeq + 1
  }
  if (nextSeq <= targetSeq) throw new CdpError('NOT_FOUND', `the journal ends with sequence ${nextSeq - 1}, before ${targetSeq}`)
}

/** Reads every frame that a promotion needs. @throws as framesOf */
export const readThrough = async (job: PromotionJob, pace: PromotionPace | undefined, signal: AbortSignal): Promise<void> => {
  let pending = 0
  for await (const { bytes } of framesOf(job, signal)) {
    pending += bytes
    if (pending < BATCH_BYTES) continue
    await pace?.(pending, signal)
    pending = 0
  }
}

/** Consecutive data records that continue each other on the disk and in the payload are looked up as one range. */
const rangeAt = (table: RecordTable, first: number, endIndex: number): { endIndex: number; lengthBytes: number } => {
  let lengthBytes = table.lengthBytes(first)
  let index = first + 1
  const isData = hasData(table.kind(first))
  for (; isData && index < endIndex; index++) {
    const goesOn =
      hasRange(table.kind(index)) && hasData(table.kind(index)) && table.disk(index) === table.disk(first) &&
      table.offsetBytes(index) === table.offsetBytes(first) + lengthBytes && table.payloadOffset(index) === table.payloadOffset(first) + lengthBytes
    if (!goesOn) break
    lengthBytes += table.lengthBytes(index)
  }
  return { endIndex: index, lengthBytes }
}

/**
 * Brings the mirror to the state after `targetSeq`. The journal is read once, in order; of each record only what no later one (up to
 * the target) overwrites is written, so that the stretches of a batch do not overlap and go out in the order of the disk. Doing it
 * again, from any point of a broken attempt, ends in the same bytes. Nothing is durable before the target's `datasync`.
 * @param job.view the index as of `targetSeq`
 * @throws as framesOf, and what the mirror throws
 */
export const promoteRecords = async (job: PromotionJob & { view: IndexView; files: FilePool; target: PromotionTarget; batchBytes?: number; pace: (bytes: number) => Promise<void>; signal: AbortSignal }): Promise<void> => {
  const { baseSeq, targetSeq, view, target, batchBytes = BATCH_BYTES, pace, signal } = job
  let slab = Buffer.allocUnsafeSlow(Math.min(BATCH_BYTES, job.totalBytes))
  let used = 0
  let readBytes = 0
  let batch: Stretch[] = []
  const flush = async (): Promise<void> => {
    await target.apply(batch)
    batch = []
    used = 0
    await pace(readBytes)
    readBytes = 0
    if (signal.aborted) throw toCdpError(signal.reason, 'ABORTED')
  }
  const passed = new Map<number, string>()
  for await (const { segmentNumber, offsetBytes: frameOffset, bytes, frame } of framesOf({ ...job, onPassed: (segment, path) => void passed.set(segment, path) }, signal)) {
    const { header, table } = frame
    readBytes += bytes
    if (used + header.payloadRawBytes > slab.length || batch.length >= BATCH_STRETCHES || readBytes >= batchBytes) await flush()
    // Compressed frames may hold more than the journal is long.
    if (header.payloadRawBytes > slab.length) slab = Buffer.allocUnsafeSlow(MAX_FRAME_PAYLOAD_BYTES)
    let payload: Buffer | undefined
    const end = Math.min(table.count, targetSeq - header.firstSeq + 1)
    for (let index = Math.max(0, baseSeq + 1 - header.firstSeq); index < end;) {
      const kind = table.kind(index)
      const disk = table.disk(index)
      if (!hasRange(kind)) {
        if (kind === RecordKind.resize) await target.grow(disk, table.offsetBytes(index))
        index++
        continue
      }
      const startBytes = table.offsetBytes(index)
      const { endIndex, lengthBytes } = rangeAt(table, index, end)
      for (const piece of await view.resolve(disk, startBytes, lengthBytes)) {
        if (piece.segment !== segmentNumber) continue
        if (piece.from === 'zero' && !hasData(kind)) {
          batch.push({ disk, offsetBytes: piece.offsetBytes, lengthBytes: piece.lengthBytes, data: undefined })
        } else if (piece.from === 'data' && hasData(kind) && piece.frameOffset === frameOffset && piece.payloadOffset - table.payloadOffset(index) === piece.offsetBytes - startBytes) {
          payload ??= decodeFramePayload(header, frame.stored)
          if (used + piece.lengthBytes > slab.length) await flush()
          const data = slab.subarray(used, used + piece.lengthBytes)
          payload.copy(data, 0, piece.payloadOffset, piece.payloadOffset + piece.lengthBytes)
          used += piece.lengthBytes
          batch.push({ disk, offsetBytes: piece.offsetBytes, lengthBytes: piece.lengthBytes, data })
        }
      }
      index = endIndex
    }
  }
  await flush()
  // What a damaged frame zeroed, the index says without it.
  for (const [segmentNumber, path] of passed) {
    for (const { disk, offsetBytes, lengthBytes } of (await leafExtents(job.files, path, (frameOffset) => frameOffset === undefined)) ?? []) {
      for (const piece of await view.resolve(disk, offsetBytes, lengthBytes)) {
        if (piece.from === 'zero' && piece.segment === segmentNumber) batch.push({ disk, offsetBytes: piece.offsetBytes, lengthBytes: piece.lengthBytes, data: undefined })
      }
      if (batch.length >= BATCH_STRETCHES) await flush()
    }
    await flush()
  }
}
