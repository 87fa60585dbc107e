import { crc32c } from '@node-rs/crc32'
import { CdpError } from '../errors/index.ts'
import {
  Compression, FRAME_HEADER_BYTES, FRAME_MAGIC, FRAME_VERSION, MAX_FRAME_PAYLOAD_BYTES, MAX_FRAME_RECORDS, NO_DISK, RECORD_ENTRY_BYTES,
  alignToSector, writeU64,
} from './layout.ts'
import type { RecordKind } from './layout.ts'

export type FrameSeal = {
  firstSeq: number
  epoch: number
  atUnixMs: number
  /** Required flags, see layout.ts. */
  flags: number
}

/** A finished frame, ready for writev: header and table, then the payload as stored. */
export type SealedFrame = { firstSeq: number; lastSeq: number; head: Buffer; payload: Buffer; lengthBytes: number }

const NOTHING = Buffer.alloc(0)

/** Decides for each payload whether to compress it; returns the compressed bytes, or undefined for "store it". */
export type Compressor = (raw: Buffer) => Buffer | undefined

/** What a builder is made of, on its way to another thread and back: slab, record table and how much of both is used. */
export type FrameParts = { payload: Uint8Array; table: Uint8Array; recordCount: number; payloadBytes: number }

/**
 * Collects records of one frame in a caller's slab. Data are placed by the caller: `reserveData` says where.
 * Nothing is allocated per record.
 */
export class FrameBuilder {
  #payload: Buffer
  #table: Buffer
  #count = 0
  #payloadBytes = 0

  /** @param payload slab that data go to, at most 4 MiB, a multiple of 512 bytes; or what another builder has given away */
  constructor(payload: Buffer | FrameParts, maxRecords = 4096) {
    if (!Buffer.isBuffer(payload)) {
      this.#payload = NOTHING
      this.#table = NOTHING
      this.takeBack(payload)
      return
    }
    if (payload.length > MAX_FRAME_PAYLOAD_BYTES || maxRecords > MAX_FRAME_RECORDS) throw new CdpError('INTERNAL', 'frame builder beyond the caps of the format')
    this.#payload = payload
    this.#table = Buffer.allocUnsafeSlow(maxRecords * RECORD_ENTRY_BYTES)
  }

  /** Gives away all it has; its two buffers each lie alone in their memory, if the slab does. Until `takeBack` the builder is empty and of no use. */
  give(): FrameParts {
    const parts = { payload: this.#payload, table: this.#table, recordCount: this.#count, payloadBytes: this.#payloadBytes }
    this.#payload = NOTHING
    this.#table = NOTHING
    this.reset()
    return parts
  }

  /** Has what was given away, as it was. */
  takeBack({ payload, table, recordCount, payloadBytes }: FrameParts): void {
    this.#payload = Buffer.from(payload.buffer, payload.byteOffset, payload.byteLength)
    this.#table = Buffer.from(table.buffer, table.byteOffset, table.byteLength)
    this.#count = recordCount
    this.#payloadBytes = payloadBytes
  }

  get recordCount(): number {
    return this.#count
  }

  get payloadBytes(): number {
    return this.#payloadBytes
  }

  /** The slab that data of this frame are placed in. */
  get payload(): Buffer {
    return this.#payload
  }

  /** True if one more record with that much data has room. */
  fits(dataBytes: number): boolean {
    return (this.#count + 1) * RECORD_ENTRY_BYTES <= this.#table.length && this.#payloadBytes + alignToSector(dataBytes) <= this.#payload.length
  }

  /** Adds a record without data. The caller has asked `fits(0)`. */
  addRange(kind: RecordKind, disk: number, offsetBytes: number, lengthBytes: number): void {
    this.#addEntry(kind, disk, offsetBytes, lengthBytes, 0)
  }

  /** Adds a record with data and returns where in `payload` its `lengthBytes` go. The caller has asked `fits(lengthBytes)`. */
  reserveData(kind: RecordKind, disk: number, offsetBytes: number, lengthBytes: number): number {
    const payloadOffset = this.#payloadBytes
    this.#addEntry(kind, disk, offsetBytes, lengthBytes, payloadOffset)
    this.#payloadBytes = payloadOffset + alignToSector(lengthBytes)
    return payloadOffset
  }

  /** Adds a record that carries JSON. The caller has asked `fits(Buffer.byteLength(text))`. */
  addJson(kind: RecordKind, offsetBytes: number, text: string): void {
    const lengthBytes = Buffer.byteLength(text)
    const payloadOffset = this.reserveData(kind, NO_DISK, offsetBytes, lengthBytes)
    this.#payload.write(text, payloadOffset)
    this.#payload.fill(0, payloadOffset + lengthBytes, this.#payloadBytes)
  }

  /**
   * Finishes the frame. If the payload is stored as it is, the frame *keeps the slab*: give the builder another one with `reset`.
   * `keepsSlab` of the answer says so.
   */
  seal(seal: FrameSeal, compress?: Compressor): SealedFrame & { keepsSlab: boolean } {
    const raw = this.#payload.subarray(0, this.#payloadBytes)
    const compressed = raw.length > 0 ? compress?.(raw) : undefined
    const pays = compressed !== undefined && compressed.length < raw.length
    // A nearly empty slab is not worth keeping: its few bytes are copied out.
    const keepsSlab = !pays && raw.length > this.#payload.length / 4
    const payload = pays ? compressed : keepsSlab ? raw : Buffer.from(raw)
    const tableBytes = this.#count * RECORD_ENTRY_BYTES
    const head = Buffer.allocUnsafe(FRAME_HEADER_BYTES + tableBytes)
    this.#table.copy(head, FRAME_HEADER_BYTES, 0, tableBytes)
    head.fill(0, 0, FRAME_HEADER_BYTES)
    head.writeUInt32LE(FRAME_MAGIC, 0)
    head[4] = FRAME_VERSION
    head[5] = pays ? Compression.zstd : Compression.stored
    head[6] = seal.flags
    writeU64(head, seal.firstSeq, 8)
    head.writeUInt32LE(this.#count, 16)
    head.writeUInt32LE(raw.length, 20)
    head.writeUInt32LE(payload.length, 24)
    head.writeUInt32LE(seal.epoch, 28)
    writeU64(head, seal.atUnixMs, 32)
    head.writeUInt32LE(crc32c(payload, crc32c(head.subarray(FRAME_HEADER_BYTES))), 56)
    head.writeUInt32LE(crc32c(head.subarray(0, 60)), 60)
    return { firstSeq: seal.firstSeq, lastSeq: seal.firstSeq + this.#count - 1, head, payload, lengthBytes: head.length + payload.length, keepsSlab }
  }

  /** Empties the builder; with a slab, that one is used from now on. */
  reset(payload?: Buffer): void {
    if (payload !== undefined) this.#payload = payload
    this.#count = 0
    this.#payloadBytes = 0
  }

  #addEntry(kind: RecordKind, disk: number, offsetBytes: number, lengthBytes: number, payloadOffset: number): void {
    const at = this.#count++ * RECORD_ENTRY_BYTES
    const table = this.#table
    table.writeUInt16LE(kind, at)
    table.writeUInt16LE(disk, at + 2)
    table.writeUInt32LE(lengthBytes, at + 4)
    writeU64(table, offsetBytes, at + 8)
    table.writeUInt32LE(payloadOffset, at + 16)
    table.writeUInt32LE(0, at + 20)
  }
}
