import { errorMessage } from '../../core/errors/index.ts'
import type { JournalLog } from './journal-log.ts'
import type { Damage } from './segment-info.ts'
import type { SegmentSealer } from './segment-sealer.ts'

export type VerifyReport = { segments: number; frames: number; records: number; readBytes: number; damage: Damage[] }

/** Reads every segment from end to end in the sealing worker, one after the other, up to what is durable now. */
export const verifyJournal = async (journal: JournalLog, sealer: SegmentSealer, options: { signal?: AbortSignal } = {}): Promise<VerifyReport> => {
  const report: VerifyReport = { segments: 0, frames: 0, records: 0, readBytes: 0, damage: [] }
  const add = (damage: Damage): void => {
    report.damage.push(damage)
    journal.damage.add(damage)
  }
  let previousDigest: Buffer | undefined
  let nextSeq: number | undefined
  for (const info of [...journal.segments]) {
    options.signal?.throwIfAborted()
    const { path, firstSeq, lastSeq, framesEndBytes, sealed, segmentNumber: segment } = info
    if (nextSeq !== undefined && firstSeq > nextSeq) add({ segment, firstSeq: nextSeq, lastSeq: firstSeq - 1, what: 'these records are missing' })
    try {
      const verified = await sealer.verify({ path, firstSeq, lastSeq, framesEndBytes, sealed, previousDigest })
      report.segments++
      report.frames += verified.frames
      report.records += verified.records
      report.readBytes += verified.readBytes
      for (const bad of verified.bad) add({ segment, ...bad })
    } catch (error) {
      add({ segment, firstSeq, lastSeq, what: `the segment cannot be read: ${errorMessage(error)}` })
    }
    previousDigest = info.digest
    nextSeq = lastSeq + 1
  }
  return report
}
