import { describe, expect, test } from '@jest/globals'
import {
  HASH_BYTES, HASH_EXTENT_BYTES, HashMark, MAX_HASH_EXTENTS, MAX_OTHER_MESSAGE_BYTES, MESSAGE_HEADER_BYTES, MessageParser, MessageType, hashReplyMessage, hashRequestMessage, readHashReply, readHashRequest,
} from './index.ts'
import type { HashReply, HashRequest } from './index.ts'

const bodyOf = (message: Buffer): Buffer => message.subarray(MESSAGE_HEADER_BYTES)
const request: HashRequest = { requestId: 7, disk: 3, asOfSeq: 2 ** 40, offsetBytes: 512 * 2 ** 33, extentBytes: HASH_EXTENT_BYTES, extentCount: 128 }
const broken = expect.objectContaining({ code: 'STREAM_PROTOCOL' })

describe('hash messages', () => {
  test('say what they were told, through the parser, in any cut', () => {
    const full: HashReply = { requestId: 9, marks: new Uint8Array(MAX_HASH_EXTENTS), hashes: Buffer.alloc(MAX_HASH_EXTENTS * HASH_BYTES, 5) }
    const mixed: HashReply = { requestId: 1, marks: Uint8Array.of(HashMark.zero, HashMark.hash, HashMark.unknown, HashMark.hash), hashes: Buffer.concat([Buffer.alloc(32, 1), Buffer.alloc(32, 2)]) }
    const failed: HashReply = { requestId: 2, error: { code: 'NOT_FOUND', message: 'gone' } }
    const stream = Buffer.concat([hashRequestMessage(request), hashReplyMessage(mixed), hashReplyMessage(failed), hashReplyMessage(full)])
    for (const cut of [1, 9, 41, 45, 100, stream.length - 1]) {
      const heard: unknown[] = []
      const parser = new MessageParser((type, body) => heard.push(type === MessageType.hashRequest ? readHashRequest(body) : readHashReply(body)))
      parser.push(stream.subarray(0, cut))
      parser.push(stream.subarray(cut))
      expect(heard).toHaveLength(4)
      expect(heard[0]).toEqual(request)
      expect(heard[1]).toEqual({ ...mixed, marks: Buffer.from(mixed.marks) })
      expect(heard[2]).toEqual(failed)
      expect((heard[3] as { hashes: Buffer }).hashes.equals(full.hashes)).toBe(true)
    }
    expect(hashReplyMessage(full).length).toBeLessThan(MAX_OTHER_MESSAGE_BYTES)
  })

  test.each<[string, Partial<HashRequest>]>([
    ['more extents than fit a reply', { extentCount: MAX_HASH_EXTENTS + 1 }],
    ['extents that are too small', { extentBytes: 2048 }],
    ['extents that are too large', { extentBytes: 2 * 1024 * 1024 }],
    ['no extent size', { extentBytes: 0 }],
    ['an extent size that is no power of two', { extentBytes: 65_536 + 512 }],
    ['an offset between sectors', { offsetBytes: 100 }],
    ['an end beyond 2^53', { offsetBytes: Number.MAX_SAFE_INTEGER - 511, extentCount: 2 }],
  ])('a request with %s is refused', (_what, change) => {
    expect(() => readHashRequest(bodyOf(hashRequestMessage({ ...request, ...change })))).toThrow(broken)
  })

  test('a cut, a stretched or a contradictory body is refused', () => {
    const body = bodyOf(hashRequestMessage(request))
    expect(() => readHashRequest(body.subarray(0, 31))).toThrow(broken)
    const reply = bodyOf(hashReplyMessage({ requestId: 1, marks: Uint8Array.of(0, 1), hashes: Buffer.alloc(32) }))
    for (let length = 0; length < reply.length; length++) expect(() => readHashReply(reply.subarray(0, length))).toThrow(broken)
    expect(() => readHashReply(Buffer.concat([reply, Buffer.alloc(32)]))).toThrow(broken)
    for (const [at, value] of [[4, 2], [9, 0xff], [12, 3], [13, 0]]) {
      const bad = Buffer.from(reply)
      bad[at] = value
      expect(() => readHashReply(bad)).toThrow(broken)
    }
    const error = bodyOf(hashReplyMessage({ requestId: 1, error: { code: 'IO', message: 'x' } }))
    expect(() => readHashReply(error.subarray(0, error.length - 1))).toThrow(broken)
  })
})
