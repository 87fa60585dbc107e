import { crc32c } from '@node-rs/crc32'
import { CdpError } from '../../core/errors/index.ts'

/**
 * A stamped sector, version 1: 512 bytes, little-endian. Every sector of a write carries all of it, so each sector is judged by itself.
 *
 * | offset | size | field |
 * | --- | --- | --- |
 * | 0 | 4 | magic `CDPW` |
 * | 4 | 1 | version 1 |
 * | 5 | 1 | writerCount, 1 ... 59 |
 * | 6 | 2 | writer |
 * | 8 | 4 | runId: tells one proof from another |
 * | 12 | 4 | sequence of the write, 1, 2, 3 ... for each writer |
 * | 16 | 2 | disk: index in the proof's list of disks |
 * | 18 | 2 | sectors of the whole write |
 * | 20 | 4 | sector: address on the disk in units of 512 bytes |
 * | 24 | 8 | reserved |
 * | 32 | 8 * writerCount | knowledge: for each writer `ackedUpTo` u32 and `ackedAhead` u32, see Knowledge |
 * | ... | | filling, any bytes |
 * | 508 | 4 | crc32c over bytes 0-507 |
 */
export const STAMP_BYTES = 512
export const MAX_WRITERS = 59

const MAGIC = 0x57504443
const VERSION = 1
const KNOWLEDGE_OFFSET = 32
const CRC_OFFSET = 508
const BLANK = Buffer.alloc(STAMP_BYTES)

/**
 * Which writes were acknowledged, to whichever writer: for writer u all sequences up to `[2u]`, and sequence `[2u] + 1 + b` for each bit b set
 * in `[2u + 1]`. A writer has no sequence under way beyond `[2u] + 32`, so this is exact.
 */
export type Knowledge = Uint32Array

/** Furthest that a writer's newest sequence may be ahead of its lowest one without an acknowledgement. */
export const KNOWLEDGE_WINDOW = 32

export type StampedWrite = { runId: number; writer: number; sequence: number; disk: number; firstSector: number; sectors: number }

/**
 * Stamps `target` as the content of a whole write; what is in it already is the filling.
 * @param target `sectors` * 512 bytes
 * @throws CdpError BAD_INPUT for a target of another size or too many writers
 */
export const stampWrite = (target: Buffer, write: StampedWrite, knowledge: Knowledge): void => {
  const writerCount = knowledge.length / 2
  if (target.length !== write.sectors * STAMP_BYTES || !Number.isInteger(writerCount) || writerCount > MAX_WRITERS || write.sectors > 0xffff) {
    throw new CdpError('BAD_INPUT', 'a write that cannot be stamped', { context: { bytes: target.length, sectors: write.sectors, writerCount } })
  }
  const knowledgeEnd = KNOWLEDGE_OFFSET + knowledge.length * 4
  target.writeUInt32LE(MAGIC, 0)
  target[4] = VERSION
  target[5] = writerCount
  target.writeUInt16LE(write.writer, 6)
  target.writeUInt32LE(write.runId, 8)
  target.writeUInt32LE(write.sequence, 12)
  target.writeUInt16LE(write.disk, 16)
  target.writeUInt16LE(write.sectors, 18)
  target.fill(0, 24, KNOWLEDGE_OFFSET)
  for (let at = 0; at < knowledge.length; at++) target.writeUInt32LE(knowledge[at], KNOWLEDGE_OFFSET + at * 4)
  for (let sector = 0; sector < write.sectors; sector++) {
    const at = sector * STAMP_BYTES
    if (sector > 0) target.copy(target, at, 0, knowledgeEnd)
    target.writeUInt32LE(write.firstSector + sector, at + 20)
    target.writeUInt32LE(crc32c(target.subarray(at, at + CRC_OFFSET)), at + CRC_OFFSET)
  }
}

/** True for a sector that was never written: all zeroes. */
export const isBlankSector = (image: Buffer, offset: number): boolean => image.compare(BLANK, 0, STAMP_BYTES, offset, offset + STAMP_BYTES) === 0

/** Why the 512 bytes at `offset` are not a stamp of that run and place; undefined if they are one. */
export const stampProblem = (image: Buffer, offset: number, place: { runId: number; disk: number; sector: number; writerCount: number }): string | undefined => {
  if (image.readUInt32LE(offset) !== MAGIC) return 'neither blank nor stamped'
  if (image.readUInt32LE(offset + CRC_OFFSET) !== crc32c(image.subarray(offset, offset + CRC_OFFSET))) return 'the checksum is wrong'
  if (image[offset + 4] !== VERSION) return `version ${image[offset + 4]} is unknown`
  if (image.readUInt32LE(offset + 8) !== place.runId) return 'stamped by another run'
  if (image[offset + 5] !== place.writerCount) return 'stamped with another number of writers'
  if (image.readUInt16LE(offset + 16) !== place.disk || image.readUInt32LE(offset + 20) !== place.sector) {
    return `written for disk ${image.readUInt16LE(offset + 16)} sector ${image.readUInt32LE(offset + 20)}`
  }
  return undefined
}

/** Writer of a stamp without a problem. */
export const stampWriter = (image: Buffer, offset: number): number => image.readUInt16LE(offset + 6)

/** Sequence of a stamp without a problem. */
export const stampSequence = (image: Buffer, offset: number): number => image.readUInt32LE(offset + 12)

/** What the write knew when it was submitted. */
export const stampAckedUpTo = (image: Buffer, offset: number, writer: number): number => image.readUInt32LE(offset + KNOWLEDGE_OFFSET + writer * 8)
export const stampAckedAhead = (image: Buffer, offset: number, writer: number): number => image.readUInt32LE(offset + KNOWLEDGE_OFFSET + writer * 8 + 4)

/** Identity of the write in a stamped payload, and what it knew: for looking at journals. Undefined if it is no stamp of that run. */
export const readStamp = (data: Buffer, runId: number): { writer: number; sequence: number; disk: number; sector: number; knowledge: Knowledge } | undefined => {
  if (data.length < STAMP_BYTES || data.readUInt32LE(0) !== MAGIC || data.readUInt32LE(8) !== runId) return undefined
  const place = { runId, disk: data.readUInt16LE(16), sector: data.readUInt32LE(20), writerCount: data[5] }
  if (stampProblem(data, 0, place) !== undefined) return undefined
  const knowledge = Uint32Array.from({ length: place.writerCount * 2 }, (_, at) => data.readUInt32LE(KNOWLEDGE_OFFSET + at * 4))
  return { writer: stampWriter(data, 0), sequence: stampSequence(data, 0), disk: place.disk, sector: place.sector, knowledge }
}

/** True if the write was acknowledged, as far as that knowledge goes. */
export const knows = (knowledge: Knowledge, writer: number, sequence: number): boolean => {
  const ahead = sequence - knowledge[writer * 2] - 1
  return ahead < 0 || (ahead < KNOWLEDGE_WINDOW && ((knowledge[writer * 2 + 1] >>> ahead) & 1) === 1)
}
