import { crc32c } from '@node-rs/crc32'
import { readU64, writeU64 } from '../../core/record/index.ts'
import { CdpError } from '../../core/errors/index.ts'

// Header and trailer of a segment, version 1 (docs/format.md, Segment).

export const SEGMENT_HEADER_BYTES = 128
export const SEGMENT_TRAILER_BYTES = 128
export const SEGMENT_DIGEST_BYTES = 32
const HEADER_MAGIC = 0x53504443
const TRAILER_MAGIC = 0x45504443
const VERSION = 1
const CRC_OFFSET = 124
const VM_BYTES = 36

export type SegmentHeader = { firstSeq: number; createdAtUnixMs: number; segmentNumber: number; previousDigest: Buffer; vm: string }

export type SegmentTrailer = {
  lastSeq: number
  /** Where the leaf run begins and the frames end. */
  runOffsetBytes: number
  runBytes: number
  recordCount: number
  firstAtUnixMs: number
  lastAtUnixMs: number
  /** SHA-256 over header and frames. */
  digest: Buffer
}

const seal = (buffer: Buffer): Buffer => {
  buffer.writeUInt32LE(crc32c(buffer.subarray(0, CRC_OFFSET)), CRC_OFFSET)
  return buffer
}

const check = (buffer: Buffer, magic: number, what: string): void => {
  if (buffer.length < SEGMENT_HEADER_BYTES) throw new CdpError('FORMAT', `${what} is cut short`, { context: { bytes: buffer.length } })
  if (buffer.readUInt32LE(0) !== magic) throw new CdpError('FORMAT', `no ${what}: wrong magic`)
  if (buffer.readUInt32LE(CRC_OFFSET) !== crc32c(buffer.subarray(0, CRC_OFFSET))) throw new CdpError('CHECKSUM', `${what} does not match its checksum`)
  const version = buffer.readUInt32LE(4)
  if (version !== VERSION) throw new CdpError('FORMAT', `${what} of unknown version ${version}`)
}

export const encodeSegmentHeader = (header: SegmentHeader): Buffer => {
  const vm = Buffer.from(header.vm)
  if (vm.length > VM_BYTES || header.previousDigest.length !== SEGMENT_DIGEST_BYTES) throw new CdpError('INTERNAL', 'segment header with a field too long')
  const buffer = Buffer.alloc(SEGMENT_HEADER_BYTES)
  buffer.writeUInt32LE(HEADER_MAGIC, 0)
  buffer.writeUInt32LE(VERSION, 4)
  writeU64(buffer, header.firstSeq, 8)
  writeU64(buffer, header.createdAtUnixMs, 16)
  writeU64(buffer, header.segmentNumber, 24)
  header.previousDigest.copy(buffer, 32)
  vm.copy(buffer, 64)
  return seal(buffer)
}

/** @throws CdpError FORMAT or CHECKSUM */
export const parseSegmentHeader = (buffer: Buffer): SegmentHeader => {
  check(buffer, HEADER_MAGIC, 'segment header')
  const vmBytes = buffer.subarray(64, 64 + VM_BYTES)
  const end = vmBytes.indexOf(0)
  return {
    firstSeq: readU64(buffer, 8),
    createdAtUnixMs: readU64(buffer, 16),
    segmentNumber: readU64(buffer, 24),
    previousDigest: Buffer.from(buffer.subarray(32, 64)),
    vm: vmBytes.toString('utf8', 0, end === -1 ? VM_BYTES : end),
  }
}

export const encodeSegmentTrailer = (trailer: SegmentTrailer): Buffer => {
  if (trailer.digest.length !== SEGMENT_DIGEST_BYTES) throw new CdpError('INTERNAL', 'segment trailer with a digest of the wrong length')
  const buffer = Buffer.alloc(SEGMENT_TRAILER_BYTES)
  buffer.writeUInt32LE(TRAILER_MAGIC, 0)
  buffer.writeUInt32LE(VERSION, 4)
  writeU64(buffer, trailer.lastSeq, 8)
  writeU64(buffer, trailer.runOffsetBytes, 16)
  writeU64(buffer, trailer.runBytes, 24)
  writeU64(buffer, trailer.recordCount, 32)
  writeU64(buffer, trailer.firstAtUnixMs, 40)
  writeU64(buffer, trailer.lastAtUnixMs, 48)
  trailer.digest.copy(buffer, 56)
  return seal(buffer)
}

/** @throws CdpError FORMAT or CHECKSUM */
export const parseSegmentTrailer = (buffer: Buffer): SegmentTrailer => {
  check(buffer, TRAILER_MAGIC, 'segment trailer')
  return {
    lastSeq: readU64(buffer, 8),
    runOffsetBytes: readU64(buffer, 16),
    runBytes: readU64(buffer, 24),
    recordCount: readU64(buffer, 32),
    firstAtUnixMs: readU64(buffer, 40),
    lastAtUnixMs: readU64(buffer, 48),
    digest: Buffer.from(buffer.subarray(56, 56 + SEGMENT_DIGEST_BYTES)),
  }
}

/** File name of a segment. */
export const segmentFileName = (firstSeq: number): string => `${firstSeq.toString(16).padStart(16, '0')}.seg`

/** First sequence from a segment's file name, or undefined if it is none. */
export const firstSeqOfSegmentFile = (name: string): number | undefined => (/^[0-9a-f]{16}\.seg$/.test(name) ? Number.parseInt(name.slice(0, 16), 16) : undefined)
