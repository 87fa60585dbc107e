import { CdpError } from '../errors/index.ts'
import {
  IHAVEOPT_HIGH,
  IHAVEOPT_LOW,
  NBD_INFO_BLOCK_SIZE,
  NBD_INFO_EXPORT,
  NBD_MAX_STRING_BYTES,
  NBD_OPT_REPLY_MAGIC_HIGH,
  NBD_OPT_REPLY_MAGIC_LOW,
} from './constants.ts'
import type { BlockSize } from './export.ts'
import { writeU64 } from './u64.ts'

// Option request:  0 u64 "IHAVEOPT", 8 u32 option, 12 u32 length, 16 payload
// Option reply:    0 u64 0x3e889045565a9, 8 u32 option, 12 u32 reply type, 16 u32 length, 20 payload
// Strings are u32 length + UTF-8 without a terminator, at most 4096 bytes.

export const OPTION_HEADER_BYTES = 16
export const OPTION_REPLY_HEADER_BYTES = 20

/** `payload` in parts, one behind the other. */
export const encodeOption = (option: number, payload: readonly Buffer[] = []): Buffer => {
  const payloadBytes = sizeOf(payload)
  const out = Buffer.allocUnsafe(OPTION_HEADER_BYTES + payloadBytes)
  out.writeUInt32BE(IHAVEOPT_HIGH, 0)
  out.writeUInt32BE(IHAVEOPT_LOW, 4)
  out.writeUInt32BE(option, 8)
  out.writeUInt32BE(payloadBytes, 12)
  return put(out, OPTION_HEADER_BYTES, payload)
}

/** `payload` in parts, one behind the other. */
export const encodeOptionReply = (option: number, type: number, payload: readonly Buffer[] = []): Buffer => {
  const payloadBytes = sizeOf(payload)
  const out = Buffer.allocUnsafe(OPTION_REPLY_HEADER_BYTES + payloadBytes)
  out.writeUInt32BE(NBD_OPT_REPLY_MAGIC_HIGH, 0)
  out.writeUInt32BE(NBD_OPT_REPLY_MAGIC_LOW, 4)
  out.writeUInt32BE(option, 8)
  out.writeUInt32BE(type, 12)
  out.writeUInt32BE(payloadBytes, 16)
  return put(out, OPTION_REPLY_HEADER_BYTES, payload)
}

const sizeOf = (parts: readonly Buffer[]): number => parts.reduce((sum, part) => sum + part.length, 0)

const put = (target: Buffer, at: number, parts: readonly Buffer[]): Buffer => {
  for (const part of parts) {
    target.set(part, at)
    at += part.length
  }
  return target
}

/** u32 length + bytes. @throws CdpError BAD_INPUT above 4096 bytes */
export const encodeString = (text: string): Buffer => {
  const bytes = Buffer.from(text, 'utf8')
  if (bytes.length > NBD_MAX_STRING_BYTES) {
    throw new CdpError('BAD_INPUT', `A name of ${bytes.length} bytes is longer than NBD allows (${NBD_MAX_STRING_BYTES}).`)
  }
  const out = Buffer.allocUnsafe(4 + bytes.length)
  out.writeUInt32BE(bytes.length, 0)
  out.set(bytes, 4)
  return out
}

/** NBD_REP_INFO payload of NBD_INFO_EXPORT. */
export const encodeInfoExport = (sizeBytes: number, transmissionFlags: number): Buffer => {
  const out = Buffer.allocUnsafe(12)
  out.writeUInt16BE(NBD_INFO_EXPORT, 0)
  writeU64(out, sizeBytes, 2)
  out.writeUInt16BE(transmissionFlags, 10)
  return out
}

/** NBD_REP_INFO payload of NBD_INFO_BLOCK_SIZE. */
export const encodeInfoBlockSize = (size: BlockSize): Buffer => {
  const out = Buffer.allocUnsafe(14)
  out.writeUInt16BE(NBD_INFO_BLOCK_SIZE, 0)
  out.writeUInt32BE(size.minBytes, 2)
  out.writeUInt32BE(size.preferredBytes, 6)
  out.writeUInt32BE(size.maxBytes, 10)
  return out
}

/** NBD_REP_INFO payload of NBD_INFO_NAME or NBD_INFO_DESCRIPTION: u16 type + text to the end. */
export const encodeInfoText = (infoType: number, text: string): Buffer => {
  const bytes = Buffer.from(text, 'utf8')
  const lengthBytes = Math.min(bytes.length, NBD_MAX_STRING_BYTES)
  const out = Buffer.allocUnsafe(2 + lengthBytes)
  out.writeUInt16BE(infoType, 0)
  bytes.copy(out, 2, 0, lengthBytes)
  return out
}

/** Walks over an option's payload; every read checks its bounds and yields undefined past the end. */
export class OptionReader {
  readonly #bytes: Buffer
  #at = 0

  constructor(bytes: Buffer) {
    this.#bytes = bytes
  }

  get atEnd(): boolean {
    return this.#at === this.#bytes.length
  }

  u16(): number | undefined {
    if (this.#at + 2 > this.#bytes.length) return undefined
    this.#at += 2
    return this.#bytes.readUInt16BE(this.#at - 2)
  }

  u32(): number | undefined {
    if (this.#at + 4 > this.#bytes.length) return undefined
    this.#at += 4
    return this.#bytes.readUInt32BE(this.#at - 4)
  }

  /** A u32 length and that many bytes as UTF-8; undefined if cut short or above 4096 bytes. */
  string(): string | undefined {
    const lengthBytes = this.u32()
    if (lengthBytes === undefined || lengthBytes > NBD_MAX_STRING_BYTES || this.#at + lengthBytes > this.#bytes.length) return undefined
    this.#at += lengthBytes
    return this.#bytes.toString('utf8', this.#at - lengthBytes, this.#at)
  }
}
