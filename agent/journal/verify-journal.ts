import { errorMessage } from '../../core/errors/index.ts'
import type { JournalLog } from './journal-log.ts'
import type { Damage, SegmentInfo } from './segment-info.ts'
import type { SegmentSealer } from './segment-sealer.ts'
import type { VerifiedSegment } from './verify-segment.ts'

export type VerifyReport = { segments: number; frames: number; records: number; readBytes: number; damage: Damage[] }

/** Reads one segment from end to end, up to what is durable now. @throws CdpError IO, CLOSED */
export const verifySegmentOf = (journal: JournalLog, sealer: SegmentSealer, info: SegmentInfo, rateBytesPerSec?: number): Promise<VerifiedSegment> => {
  const { path, firstSeq, lastSeq, framesEndBytes, sealed } = info
  const before = journal.segments[journal.segments.indexOf(info) - 1] as SegmentInfo | undefined
  return sealer.verify({ path, firstSeq, lastSeq, framesEndBytes, sealed, previousDigest: before?.digest, ...(rateBytesPerSec === undefined ? {} : { rateBytesPerSec }) })
}

/** Reads every segment from end to end in the sealing worker, one after the other, up to what is durable now. */
export const verifyJournal = async (journal: JournalLog, sealer: SegmentSealer, options: { signal?: AbortSignal } = {}): Promise<VerifyReport> => {
  const report: VerifyReport = { segments: 0, frames: 0, records: 0, readBytes: 0, damage: [] }
  const add = (damage: Damage): void => {
    report.damage.push(damage)
    journal.damage.add(damage)
  }
  let nextSeq: number | undefined
  for (const info of [...journal.segments]) {
    options.signal?.throwIfAborted()
    const { firstSeq, lastSeq, segmentNumber: segment } = info
    if (nextSeq !== undefined && firstSeq > nextSeq) add({ segment, firstSeq: nextSeq, lastSeq: firstSeq - 1, what: 'these records are missing' })
    try {
      const verified = await verifySegmentOf(journal, sealer, info)
      report.segments++
      report.frames += verified.frames
      report.records += verified.records
      report.readBytes += verified.readBytes
      for (const { firstSeq: badFirst, lastSeq: badLast, what } of verified.bad) add({ segment, firstSeq: badFirst, lastSeq: badLast, what })
    } catch (error) {
      // What went into the mirror meanwhile is no longer a part of the journal.
      if (journal.segments.includes(info)) add({ segment, firstSeq, lastSeq, what: `the segment cannot be read: ${errorMessage(error)}` })
    }
    nextSeq = lastSeq + 1
  }
  return report
}
