import { zstdDecompressSync } from 'node:zlib'
import { crc32c } from '@node-rs/crc32'
import { CdpError } from '../errors/index.ts'
import {
  Compression, FRAME_HEADER_BYTES, FRAME_MAGIC, FRAME_VERSION, KNOWN_REQUIRED_FLAGS, MAX_FRAME_PAYLOAD_BYTES, MAX_FRAME_RECORDS,
  RECORD_ENTRY_BYTES, SECTOR_BYTES, hasData, hasJson, hasRange, isKnownKind, readU64,
} from './layout.ts'

export type FrameHeader = {
  compression: Compression
  /** Required flags, see layout.ts. */
  flags: number
  firstSeq: number
  lastSeq: number
  recordCount: number
  payloadRawBytes: number
  payloadStoredBytes: number
  epoch: number
  atUnixMs: number
  bodyCrc32c: number
  /** Bytes of the table and of the stored payload: what follows the header. */
  bodyBytes: number
}

const bad = (message: string, context: Record<string, number> = {}): CdpError => new CdpError('FORMAT', message, { context })

/**
 * Reads and checks the 64 bytes of a frame header at `offset`.
 * @throws CdpError CHECKSUM if the header's checksum is wrong, FORMAT if it is no frame of version 1 or a cap is exceeded
 */
export const parseFrameHeader = (buffer: Buffer, offset = 0): FrameHeader => {
  if (buffer.length - offset < FRAME_HEADER_BYTES) throw bad('frame header is cut short', { bytes: buffer.length - offset })
  if (buffer.readUInt32LE(offset) !== FRAME_MAGIC) throw bad('no frame: wrong magic')
  if (buffer.readUInt32LE(offset + 60) !== crc32c(buffer.subarray(offset, offset + 60))) throw new CdpError('CHECKSUM', 'frame header does not match its checksum')
  const version = buffer[offset + 4]
  if (version !== FRAME_VERSION) throw bad(`frame of unknown version ${version}`)
  const compression = buffer[offset + 5]
  if (compression !== Compression.stored && compression !== Compression.zstd) throw bad(`frame with unknown compression ${compression}`)
  const flags = buffer[offset + 6]
  if ((flags & ~KNOWN_REQUIRED_FLAGS) !== 0) throw bad(`frame with unknown required flags ${flags}`)
  const firstSeq = readU64(buffer, offset + 8)
  const recordCount = buffer.readUInt32LE(offset + 16)
  const payloadRawBytes = buffer.readUInt32LE(offset + 20)
  const payloadStoredBytes = buffer.readUInt32LE(offset + 24)
  if (recordCount === 0 || recordCount > MAX_FRAME_RECORDS) throw bad('frame with a record count out of range', { recordCount })
  const atUnixMs = readU64(buffer, offset + 32)
  if (atUnixMs > Number.MAX_SAFE_INTEGER) throw bad('frame with a time out of range')
  if (firstSeq === 0 || firstSeq + recordCount > Number.MAX_SAFE_INTEGER) throw bad('frame with a sequence out of range')
  if (payloadRawBytes > MAX_FRAME_PAYLOAD_BYTES || payloadRawBytes % SECTOR_BYTES !== 0) throw bad('frame with a payload size out of range', { payloadRawBytes })
  if (compression === Compression.stored ? payloadStoredBytes !== payloadRawBytes : payloadStoredBytes >= payloadRawBytes) {
    throw bad('frame with contradicting payload sizes', { payloadRawBytes, payloadStoredBytes })
  }
  return {
    compression,
    flags,
    firstSeq,
    lastSeq: firstSeq + recordCount - 1,
    recordCount,
    payloadRawBytes,
    payloadStoredBytes,
    epoch: buffer.readUInt32LE(offset + 28),
    atUnixMs,
    bodyCrc32c: buffer.readUInt32LE(offset + 56),
    bodyBytes: recordCount * RECORD_ENTRY_BYTES + payloadStoredBytes,
  }
}

/**
 * The record table of a frame: an accessor over bytes, no object per record.
 * `buffer` must hold `recordCount` entries from `offset` on; `validate` checks them.
 */
export class RecordTable {
  readonly count: number
  readonly #buffer: Buffer
  readonly #offset: number

  constructor(buffer: Buffer, offset: number, count: number) {
    if (buffer.length - offset < count * RECORD_ENTRY_BYTES) throw bad('record table is cut short', { count })
    this.#buffer = buffer
    this.#offset = offset
    this.count = count
  }

  kind(index: number): number {
    return this.#buffer[this.#offset + index * RECORD_ENTRY_BYTES]
  }

  /** Always 0 in version 1. */
  flags(index: number): number {
    return this.#buffer[this.#offset + index * RECORD_ENTRY_BYTES + 1]
  }

  disk(index: number): number {
    return this.#buffer.readUInt16LE(this.#offset + index * RECORD_ENTRY_BYTES + 2)
  }

  lengthBytes(index: number): number {
    return this.#buffer.readUInt32LE(this.#offset + index * RECORD_ENTRY_BYTES + 4)
  }

  offsetBytes(index: number): number {
    return readU64(this.#buffer, this.#offset + index * RECORD_ENTRY_BYTES + 8)
  }

  payloadOffset(index: number): number {
    return this.#buffer.readUInt32LE(this.#offset + index * RECORD_ENTRY_BYTES + 16)
  }

  /** @throws CdpError FORMAT if an entry is of an unknown kind, bears unknown flags or points outside its bounds */
  validate(payloadRawBytes: number): void {
    let jsonBytes = 0
    for (let index = 0; index < this.count; index++) {
      const kind = this.kind(index)
      const lengthBytes = this.lengthBytes(index)
      const offsetBytes = this.offsetBytes(index)
      if (!isKnownKind(kind)) throw bad('record of unknown kind', { kind, index })
      if (this.flags(index) !== 0) throw bad('record with unknown flags', { kind, index, flags: this.flags(index) })
      if (offsetBytes + lengthBytes > Number.MAX_SAFE_INTEGER) throw bad('record with an offset out of range', { kind, index })
      if (hasRange(kind) && (lengthBytes === 0 || lengthBytes % SECTOR_BYTES !== 0 || offsetBytes % SECTOR_BYTES !== 0)) {
        throw bad('record whose range is not made of sectors', { kind, index, offsetBytes, lengthBytes })
      }
      if (hasData(kind) || hasJson(kind)) {
        const payloadOffset = this.payloadOffset(index)
        if (payloadOffset % SECTOR_BYTES !== 0 || payloadOffset + lengthBytes > payloadRawBytes) {
          throw bad('record whose data lie outside the payload', { kind, index, payloadOffset, lengthBytes, payloadRawBytes })
        }
        // Many records may not name the same text: all of it would be parsed again for each of them.
        if (hasJson(kind)) jsonBytes += lengthBytes
        if (jsonBytes > payloadRawBytes) throw bad('records whose texts overlap', { kind, index, jsonBytes, payloadRawBytes })
      }
    }
  }
}

/** @throws CdpError CHECKSUM if the body (table and stored payload, at `offset`) does not match the header */
export const verifyFrameBody = (header: FrameHeader, buffer: Buffer, offset: number): void => {
  if (buffer.length - offset < header.bodyBytes) throw bad('frame body is cut short', { wanted: header.bodyBytes, bytes: buffer.length - offset })
  if (crc32c(buffer.subarray(offset, offset + header.bodyBytes)) !== header.bodyCrc32c) {
    throw new CdpError('CHECKSUM', 'frame body does not match its checksum', { context: { firstSeq: header.firstSeq, lastSeq: header.lastSeq } })
  }
}

/**
 * The raw payload of a frame from its stored bytes: a view if it was stored, else a new buffer of `payloadRawBytes`.
 * @throws CdpError FORMAT if it does not decompress to exactly the announced size
 */
export const decodeFramePayload = (header: FrameHeader, stored: Buffer): Buffer => {
  if (header.compression === Compression.stored) return stored
  let raw: Buffer
  try {
    raw = zstdDecompressSync(stored, { maxOutputLength: header.payloadRawBytes })
  } catch (cause) {
    throw new CdpError('FORMAT', 'frame payload does not decompress', { cause, context: { firstSeq: header.firstSeq } })
  }
  if (raw.length !== header.payloadRawBytes) throw bad('frame payload decompresses to another size', { wanted: header.payloadRawBytes, bytes: raw.length })
  return raw
}

export type Frame = { header: FrameHeader; table: RecordTable; /** Payload as stored. */ stored: Buffer }

/**
 * A whole frame from `buffer` at `offset`, checked from magic to last checksum and every table entry.
 * @throws CdpError FORMAT or CHECKSUM
 */
export const parseFrame = (buffer: Buffer, offset = 0): Frame => {
  const header = parseFrameHeader(buffer, offset)
  const bodyOffset = offset + FRAME_HEADER_BYTES
  verifyFrameBody(header, buffer, bodyOffset)
  const table = new RecordTable(buffer, bodyOffset, header.recordCount)
  table.validate(header.payloadRawBytes)
  const storedOffset = bodyOffset + header.recordCount * RECORD_ENTRY_BYTES
  return { header, table, stored: buffer.subarray(storedOffset, storedOffset + header.payloadStoredBytes) }
}

/**
 * JSON of record `index`, from the frame's raw payload.
 * @throws CdpError FORMAT if it is not JSON
 */
export const recordJson = (table: RecordTable, index: number, rawPayload: Buffer): unknown => {
  const start = table.payloadOffset(index)
  try {
    return JSON.parse(rawPayload.toString('utf8', start, start + table.lengthBytes(index)))
  } catch (cause) {
    throw new CdpError('FORMAT', 'record holds broken JSON', { cause, context: { index } })
  }
}
