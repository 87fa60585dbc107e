import { CdpError } from '../errors/index.ts'
import { readU64, writeU64 } from '../record/index.ts'
import { MESSAGE_HEADER_BYTES, MessageType, messageHeader } from './messages.ts'

// Question and answer of a delta sync (docs/format.md, Stream): what the agent holds of a range of extents as of a sequence.

export const HASH_BYTES = 32
export const HASH_EXTENT_BYTES = 64 * 1024
export const MAX_HASH_EXTENTS = 1024
/** Questions of one stream that the agent keeps at a time. */
export const MAX_HASH_REQUESTS = 8
const SMALLEST_EXTENT_BYTES = 4096
const LARGEST_EXTENT_BYTES = 1024 * 1024
const REQUEST_BYTES = 32
const REPLY_HEAD_BYTES = 12
const SECTOR_BYTES = 512

/** What is known of an extent: a hash follows, it reads as zeroes, or it cannot be read (its place in the journal is damaged). */
export const HashMark = { hash: 0, zero: 1, unknown: 2 } as const

/** `extentCount` 0: nothing more will be asked as of any sequence; there is no reply to that. */
export type HashRequest = { requestId: number; disk: number; asOfSeq: number; offsetBytes: number; extentBytes: number; extentCount: number }
/** One mark an extent; SHA-256 of those marked `hash`, in order. */
export type ExtentHashes = { marks: Uint8Array; hashes: Buffer }
export type HashReply = { requestId: number } & (ExtentHashes | { error: { code: string; message: string } })

export const hashRequestMessage = (request: HashRequest): Buffer => {
  const buffer = Buffer.alloc(MESSAGE_HEADER_BYTES + REQUEST_BYTES)
  messageHeader(MessageType.hashRequest, REQUEST_BYTES).copy(buffer)
  const body = buffer.subarray(MESSAGE_HEADER_BYTES)
  body.writeUInt32LE(request.requestId, 0)
  body.writeUInt16LE(request.disk, 4)
  writeU64(body, request.asOfSeq, 8)
  writeU64(body, request.offsetBytes, 16)
  body.writeUInt32LE(request.extentBytes, 24)
  body.writeUInt32LE(request.extentCount, 28)
  return buffer
}

const broken = (what: string): CdpError => new CdpError('STREAM_PROTOCOL', `broken ${what} message`)

/** @throws CdpError STREAM_PROTOCOL */
export const readHashRequest = (body: Buffer): HashRequest => {
  if (body.length !== REQUEST_BYTES) throw broken('hashRequest')
  const request: HashRequest = {
    requestId: body.readUInt32LE(0), disk: body.readUInt16LE(4), asOfSeq: readU64(body, 8), offsetBytes: readU64(body, 16), extentBytes: body.readUInt32LE(24), extentCount: body.readUInt32LE(28),
  }
  const { offsetBytes, extentBytes, extentCount } = request
  const fits = Number.isSafeInteger(request.asOfSeq) && Number.isSafeInteger(offsetBytes + extentBytes * extentCount) && offsetBytes % SECTOR_BYTES === 0
  const isPowerOfTwo = extentBytes > 0 && Number.isInteger(Math.log2(extentBytes))
  if (!fits || !isPowerOfTwo || extentBytes < SMALLEST_EXTENT_BYTES || extentBytes > LARGEST_EXTENT_BYTES || extentCount > MAX_HASH_EXTENTS) throw broken('hashRequest')
  return request
}

export const hashReplyMessage = (reply: HashReply): Buffer => {
  const parts = 'error' in reply ? [Buffer.from(JSON.stringify(reply.error))] : [reply.marks, reply.hashes]
  const lengthBytes = REPLY_HEAD_BYTES + parts.reduce((sum, part) => sum + part.length, 0)
  const head = Buffer.alloc(REPLY_HEAD_BYTES)
  head.writeUInt32LE(reply.requestId, 0)
  head.writeUInt32LE('error' in reply ? 1 : 0, 4)
  head.writeUInt32LE('error' in reply ? 0 : reply.marks.length, 8)
  return Buffer.concat([messageHeader(MessageType.hashReply, lengthBytes), head, ...parts])
}

/** Views into `body`. @throws CdpError STREAM_PROTOCOL */
export const readHashReply = (body: Buffer): HashReply => {
  if (body.length < REPLY_HEAD_BYTES) throw broken('hashReply')
  const requestId = body.readUInt32LE(0)
  const failed = body.readUInt32LE(4)
  const count = body.readUInt32LE(8)
  if (failed === 1) return { requestId, error: readError(body.subarray(REPLY_HEAD_BYTES)) }
  if (failed !== 0 || count > MAX_HASH_EXTENTS || body.length < REPLY_HEAD_BYTES + count) throw broken('hashReply')
  const marks = body.subarray(REPLY_HEAD_BYTES, REPLY_HEAD_BYTES + count)
  const hashes = body.subarray(REPLY_HEAD_BYTES + count)
  let hashed = 0
  for (const mark of marks) {
    if (mark === HashMark.hash) hashed++
    else if (mark !== HashMark.zero && mark !== HashMark.unknown) throw broken('hashReply')
  }
  if (hashes.length !== hashed * HASH_BYTES) throw broken('hashReply')
  return { requestId, marks, hashes }
}

const readError = (text: Buffer): { code: string; message: string } => {
  let json: unknown
  try {
    json = JSON.parse(text.toString('utf8'))
  } catch {
    throw broken('hashReply')
  }
  const { code, message } = (json ?? {}) as { code?: unknown; message?: unknown }
  if (typeof code !== 'string' || typeof message !== 'string') throw broken('hashReply')
  return { code, message }
}
