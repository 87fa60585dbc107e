import {
  NBD_REPLY_FLAG_DONE,
  NBD_REPLY_TYPE_BLOCK_STATUS,
  NBD_REPLY_TYPE_ERROR,
  NBD_REPLY_TYPE_NONE,
  NBD_REPLY_TYPE_OFFSET_DATA,
  NBD_REPLY_TYPE_OFFSET_HOLE,
  NBD_SIMPLE_REPLY_MAGIC,
  NBD_STRUCTURED_REPLY_MAGIC,
  SIMPLE_REPLY_BYTES,
  STRUCTURED_REPLY_HEADER_BYTES,
} from './constants.ts'
import type { Extent } from './export.ts'
import { writeU64 } from './u64.ts'

// Every function writes at `at` into the caller's buffer, allocates nothing and returns the position behind what it wrote.
// Simple reply:      0 u32 magic 0x67446698, 4 u32 error, 8 u64 cookie                                        (then the data of a READ)
// Structured chunk:  0 u32 magic 0x668e33ef, 4 u16 flags, 6 u16 type, 8 u64 cookie, 16 u32 payload length     (then the payload)

/** Bytes in front of the data in an offset-data chunk. */
export const OFFSET_DATA_HEADER_BYTES = STRUCTURED_REPLY_HEADER_BYTES + 8
export const OFFSET_HOLE_BYTES = STRUCTURED_REPLY_HEADER_BYTES + 12
export const NONE_CHUNK_BYTES = STRUCTURED_REPLY_HEADER_BYTES
/** Size of a block status chunk of `extentCount` extents. */
export const blockStatusBytes = (extentCount: number): number => STRUCTURED_REPLY_HEADER_BYTES + 4 + 8 * extentCount
/** Size of an error chunk with a message of `messageBytes` bytes. */
export const errorChunkBytes = (messageBytes: number): number => STRUCTURED_REPLY_HEADER_BYTES + 6 + messageBytes

/** 16 bytes; `error` is 0 or an NBD_E... value. */
export const writeSimpleReply = (target: Buffer, at: number, error: number, cookieHigh: number, cookieLow: number): number => {
  target.writeUInt32BE(NBD_SIMPLE_REPLY_MAGIC, at)
  target.writeUInt32BE(error, at + 4)
  target.writeUInt32BE(cookieHigh, at + 8)
  target.writeUInt32BE(cookieLow, at + 12)
  return at + SIMPLE_REPLY_BYTES
}

const writeChunkHeader = (target: Buffer, at: number, done: boolean, type: number, cookieHigh: number, cookieLow: number, payloadBytes: number): number => {
  target.writeUInt32BE(NBD_STRUCTURED_REPLY_MAGIC, at)
  target.writeUInt16BE(done ? NBD_REPLY_FLAG_DONE : 0, at + 4)
  target.writeUInt16BE(type, at + 6)
  target.writeUInt32BE(cookieHigh, at + 8)
  target.writeUInt32BE(cookieLow, at + 12)
  target.writeUInt32BE(payloadBytes, at + 16)
  return at + STRUCTURED_REPLY_HEADER_BYTES
}

/** 28 bytes; the caller sends `dataBytes` bytes of data right behind them. */
export const writeOffsetDataHeader = (
  target: Buffer, at: number, done: boolean, cookieHigh: number, cookieLow: number, offsetBytes: number, dataBytes: number,
): number => {
  const next = writeChunkHeader(target, at, done, NBD_REPLY_TYPE_OFFSET_DATA, cookieHigh, cookieLow, 8 + dataBytes)
  writeU64(target, offsetBytes, next)
  return next + 8
}

/** 32 bytes. */
export const writeOffsetHole = (
  target: Buffer, at: number, done: boolean, cookieHigh: number, cookieLow: number, offsetBytes: number, lengthBytes: number,
): number => {
  const next = writeChunkHeader(target, at, done, NBD_REPLY_TYPE_OFFSET_HOLE, cookieHigh, cookieLow, 12)
  writeU64(target, offsetBytes, next)
  target.writeUInt32BE(lengthBytes, next + 8)
  return next + 12
}

/** blockStatusBytes(extents.length) bytes. */
export const writeBlockStatus = (
  target: Buffer, at: number, done: boolean, cookieHigh: number, cookieLow: number, contextId: number, extents: readonly Extent[],
): number => {
  let next = writeChunkHeader(target, at, done, NBD_REPLY_TYPE_BLOCK_STATUS, cookieHigh, cookieLow, 4 + 8 * extents.length)
  next = target.writeUInt32BE(contextId, next)
  for (const extent of extents) {
    next = target.writeUInt32BE(extent.lengthBytes, next)
    next = target.writeUInt32BE(extent.flags, next)
  }
  return next
}

/** errorChunkBytes(message.length) bytes; always ends the reply. `message` is UTF-8, at most 4096 bytes. */
export const writeErrorChunk = (target: Buffer, at: number, cookieHigh: number, cookieLow: number, error: number, message: Uint8Array): number => {
  const next = writeChunkHeader(target, at, true, NBD_REPLY_TYPE_ERROR, cookieHigh, cookieLow, 6 + message.length)
  target.writeUInt32BE(error, next)
  target.writeUInt16BE(message.length, next + 4)
  target.set(message, next + 6)
  return next + 6 + message.length
}

/** 20 bytes: a reply without content, success. */
export const writeNoneChunk = (target: Buffer, at: number, cookieHigh: number, cookieLow: number): number =>
  writeChunkHeader(target, at, true, NBD_REPLY_TYPE_NONE, cookieHigh, cookieLow, 0)
