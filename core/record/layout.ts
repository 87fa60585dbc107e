// Layout of records and frames, version 1. The tables are in docs/format.md.

export const FRAME_MAGIC = 0x46504443
export const FRAME_VERSION = 1
export const FRAME_HEADER_BYTES = 64
export const RECORD_ENTRY_BYTES = 24
export const SECTOR_BYTES = 512
export const NO_DISK = 0xffff

/** Caps of one frame; checked before anything is allocated. */
export const MAX_FRAME_RECORDS = 16_384
export const MAX_FRAME_PAYLOAD_BYTES = 4 * 1024 * 1024
export const MAX_FRAME_BYTES = FRAME_HEADER_BYTES + MAX_FRAME_RECORDS * RECORD_ENTRY_BYTES + MAX_FRAME_PAYLOAD_BYTES

export const Compression = { stored: 0, zstd: 1 } as const
export type Compression = (typeof Compression)[keyof typeof Compression]

/** Required flag: the frame belongs to an initial sync and is applied straight to the mirror. */
export const FLAG_DIRECT = 1
export const KNOWN_REQUIRED_FLAGS = FLAG_DIRECT

export const RecordKind = {
  write: 1,
  zero: 2,
  discard: 3,
  resize: 4,
  checkpoint: 5,
  sync: 6,
  syncZero: 7,
  syncBegin: 8,
  syncProgress: 9,
  syncEnd: 10,
  epoch: 11,
  proof: 12,
  joined: 13,
} as const
export type RecordKind = (typeof RecordKind)[keyof typeof RecordKind]

const RANGE = 1
const DATA = 2
const JSON_TEXT = 4
const TRAITS = [0, RANGE | DATA, RANGE, RANGE, 0, JSON_TEXT, RANGE | DATA, RANGE, JSON_TEXT, 0, JSON_TEXT, JSON_TEXT, JSON_TEXT, 0]

export const isKnownKind = (kind: number): kind is RecordKind => kind >= 1 && kind < TRAITS.length
/** The record changes a range of a disk: write, zero, discard, sync, syncZero. */
export const hasRange = (kind: number): boolean => (TRAITS[kind] & RANGE) !== 0
/** The record carries lengthBytes of disk data in the payload: write, sync. */
export const hasData = (kind: number): boolean => (TRAITS[kind] & DATA) !== 0
/** The record carries lengthBytes of JSON in the payload. */
export const hasJson = (kind: number): boolean => (TRAITS[kind] & JSON_TEXT) !== 0

export const alignToSector = (bytes: number): number => Math.ceil(bytes / SECTOR_BYTES) * SECTOR_BYTES

/** Writes an integer below 2^53 as u64. */
export const writeU64 = (buffer: Buffer, value: number, offset: number): void => {
  buffer.writeUInt32LE(value >>> 0, offset)
  buffer.writeUInt32LE(Math.floor(value / 0x1_0000_0000), offset + 4)
}

/** Reads a u64; the result is above Number.MAX_SAFE_INTEGER exactly if the field is out of range. */
export const readU64 = (buffer: Buffer, offset: number): number => buffer.readUInt32LE(offset) + buffer.readUInt32LE(offset + 4) * 0x1_0000_0000
