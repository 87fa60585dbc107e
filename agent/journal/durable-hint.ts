import { crc32c } from '@node-rs/crc32'
import { readU64, writeU64 } from '../../core/record/index.ts'

// `durable.hint`, 40 bytes, little-endian, overwritten in place after each commit and never waited for:
//   offset size field
//        0    4 magic `CDPH`
//        4    4 version 1
//        8    8 seq: everything up to it was durable when this was written
//       16    8 segmentNumber of the active segment
//       24    8 endBytes: where the frames of that segment ended
//       32    4 reserved
//       36    4 crc32c over bytes 0-35
// It is written only after the fdatasync of what it speaks of, so it may be behind the truth, never ahead of it. It tells a torn
// tail (above it: nobody was promised these frames, they are cut) from damage (below it: acknowledged, so it is kept and
// reported). Without it, or with a broken one, everything that follows a broken frame in the last segment counts as torn.

export const HINT_BYTES = 40
const MAGIC = 0x48504443
const VERSION = 1

export type DurableHint = { seq: number; segmentNumber: number; endBytes: number }

export const encodeDurableHint = (target: Buffer, seq: number, segmentNumber: number, endBytes: number): void => {
  target.writeUInt32LE(MAGIC, 0)
  target.writeUInt32LE(VERSION, 4)
  writeU64(target, seq, 8)
  writeU64(target, segmentNumber, 16)
  writeU64(target, endBytes, 24)
  target.writeUInt32LE(0, 32)
  target.writeUInt32LE(crc32c(target.subarray(0, 36)), 36)
}

/** The hint, or undefined if these bytes are not one. */
export const parseDurableHint = (buffer: Buffer): DurableHint | undefined => {
  if (buffer.length < HINT_BYTES || buffer.readUInt32LE(0) !== MAGIC || buffer.readUInt32LE(4) !== VERSION) return undefined
  if (buffer.readUInt32LE(36) !== crc32c(buffer.subarray(0, 36))) return undefined
  const hint = { seq: readU64(buffer, 8), segmentNumber: readU64(buffer, 16), endBytes: readU64(buffer, 24) }
  return Number.isSafeInteger(hint.seq) && Number.isSafeInteger(hint.segmentNumber) && Number.isSafeInteger(hint.endBytes) ? hint : undefined
}
