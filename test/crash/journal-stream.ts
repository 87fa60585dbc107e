import { buildFrame } from '../../agent/journal/testing.ts'
import { RecordKind } from '../../core/record/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'

// The stream that the killed writer sends: everything follows from the sequence, so that whoever reads can check it.

export const SLOTS = 64
export const RECORD_BYTES = 4096
/** The last sequence of the initial sync. */
export const BASE_END = 400
export const STREAM_DISKS: DiskEntry[] = [{ disk: 0, key: 'scsi0', sizeBytes: SLOTS * RECORD_BYTES }]

/** Records of the frame that begins with `firstSeq`. */
export const recordCountAt = (firstSeq: number): number => {
  if (firstSeq === BASE_END) return 1
  const count = 1 + ((firstSeq * 7) % 5)
  return firstSeq < BASE_END ? Math.min(count, BASE_END - firstSeq) : count
}

export const dataAt = (seq: number): Buffer => {
  const data = Buffer.alloc(RECORD_BYTES, seq & 255)
  data.writeUInt32LE(seq, 0)
  return data
}

export const frameAt = (firstSeq: number, epoch: number): Buffer => {
  if (firstSeq === BASE_END) return buildFrame({ firstSeq, epoch, direct: true, records: [{ kind: RecordKind.syncEnd, json: { kind: 'initial' } }] })
  const direct = firstSeq < BASE_END
  const records = Array.from({ length: recordCountAt(firstSeq) }, (_, at) => {
    const seq = firstSeq + at
    return { kind: RecordKind.write, offsetBytes: (seq % SLOTS) * RECORD_BYTES, data: dataAt(seq) }
  })
  return buildFrame({ firstSeq, epoch, direct, records })
}
