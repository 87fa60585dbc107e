import { describe, expect, test } from '@jest/globals'
import * as nbd from './constants.ts'
import type { Extent } from './export.ts'
import {
  blockStatusBytes, errorChunkBytes, writeBlockStatus, writeErrorChunk, writeNoneChunk, writeOffsetDataHeader, writeOffsetHole, writeSimpleReply,
} from './reply-encoder.ts'
import { ReplyParser, type ReplySink } from './reply-parser.ts'
import { randomChunks, seededIntegers } from './seeded.ts'

/** Writes events down. A simple reply whose cookie ends in 1 is that of a READ of 100 bytes. */
class Recorder implements ReplySink {
  readonly events: unknown[] = []
  #payload: Buffer[] = []

  onSimpleReply(error: number, cookieHigh: number, cookieLow: number): number {
    this.events.push(['simple', error, cookieHigh, cookieLow])
    return error === 0 && cookieLow === 1 ? 100 : 0
  }

  onData(...fields: [number, number, number, number]): void {
    this.events.push(['data', ...fields])
  }

  onPayload(chunk: Buffer, start: number, end: number): void {
    this.#payload.push(Buffer.from(chunk.subarray(start, end)))
  }

  onHole(...fields: [number, number, number, number]): void {
    this.events.push(['hole', ...fields])
  }

  onBlockStatus(cookieHigh: number, cookieLow: number, contextId: number, extents: Extent[]): void {
    this.events.push(['status', cookieHigh, cookieLow, contextId, extents])
  }

  onError(...fields: [number, number, number, string]): void {
    this.events.push(['error', ...fields])
  }

  onReplyEnd(cookieHigh: number, cookieLow: number): void {
    this.events.push(['end', cookieHigh, cookieLow, Buffer.concat(this.#payload).toString('hex')])
    this.#payload = []
  }
}

const made = (sizeBytes: number, write: (target: Buffer) => number): Buffer => {
  // Room on both sides, to see that an encoder writes its own bytes only.
  const target = Buffer.alloc(sizeBytes + 6, 0xee)
  const end = write(target)
  expect(end).toBe(3 + sizeBytes)
  expect(target.subarray(0, 3).equals(Buffer.alloc(3, 0xee)) && target.subarray(end).equals(Buffer.alloc(3, 0xee))).toBe(true)
  return target.subarray(3, end)
}

const HUGE = 2 ** 52 + 12_345

const samples = (below: (limit: number) => number): { bytes: Buffer; events: unknown[] }[] => {
  const [high, low] = [below(0xffff_ffff), 2 + below(1000)]
  const data = Buffer.from(Array.from({ length: 1 + below(3000) }, () => below(256)))
  const extents = Array.from({ length: 1 + below(200) }, () => ({ lengthBytes: 1 + below(0xffff_fff0), flags: below(4) }))
  const message = Buffer.from('Plattenfehler äöü '.repeat(below(20)))
  const simpleData = Buffer.alloc(100, 0x77)
  return [
    { bytes: made(16, (to) => writeSimpleReply(to, 3, nbd.NBD_ENOSPC, high, low)), events: [['simple', nbd.NBD_ENOSPC, high, low], ['end', high, low, '']] },
    {
      bytes: Buffer.concat([made(16, (to) => writeSimpleReply(to, 3, 0, high, 1)), simpleData]),
      events: [['simple', 0, high, 1], ['end', high, 1, simpleData.toString('hex')]],
    },
    {
      bytes: Buffer.concat([
        made(32, (to) => writeOffsetHole(to, 3, false, high, low, HUGE, 4096)),
        made(28, (to) => writeOffsetDataHeader(to, 3, true, high, low, HUGE + 4096, data.length)),
        data,
      ]),
      events: [['hole', high, low, HUGE, 4096], ['data', high, low, HUGE + 4096, data.length], ['end', high, low, data.toString('hex')]],
    },
    {
      bytes: made(blockStatusBytes(extents.length), (to) => writeBlockStatus(to, 3, true, high, low, 7, extents)),
      events: [['status', high, low, 7, extents], ['end', high, low, '']],
    },
    {
      bytes: made(errorChunkBytes(message.length), (to) => writeErrorChunk(to, 3, high, low, nbd.NBD_EIO, message)),
      events: [['error', high, low, nbd.NBD_EIO, message.toString()], ['end', high, low, '']],
    },
    { bytes: made(20, (to) => writeNoneChunk(to, 3, high, low)), events: [['end', high, low, '']] },
  ]
}

describe('ReplyParser and the reply encoder', () => {
  test('what the encoder writes is parsed back, the same for any chunking', () => {
    const seed = Date.now() >>> 0
    console.log(`seed ${seed}`)
    const below = seededIntegers(seed)
    for (let round = 0; round < 100; round++) {
      const all = samples(below)
      const replies = Array.from({ length: 1 + below(20) }, () => all[below(all.length)] ?? { bytes: Buffer.alloc(0), events: [] })
      const bytes = Buffer.concat(replies.map((reply) => reply.bytes))
      for (const longestBytes of [1, 21, 4000, bytes.length]) {
        const recorder = new Recorder()
        const parser = new ReplyParser(recorder)
        for (const chunk of randomChunks(bytes, below, longestBytes)) parser.push(chunk)
        expect(recorder.events).toEqual(replies.flatMap((reply) => reply.events))
      }
    }
  })

  const chunk = (type: number, payload: Buffer, flags = 1): Buffer => {
    const header = Buffer.alloc(20)
    header.writeUInt32BE(nbd.NBD_STRUCTURED_REPLY_MAGIC, 0)
    header.writeUInt16BE(flags, 4)
    header.writeUInt16BE(type, 6)
    header.writeUInt32BE(payload.length, 16)
    return Buffer.concat([header, payload])
  }
  const tooLong = chunk(nbd.NBD_REPLY_TYPE_BLOCK_STATUS, Buffer.alloc(0))
  tooLong.writeUInt32BE(0xffff_ffff, 16)
  test.each([
    ['no reply magic', Buffer.alloc(16)],
    ['data chunk without data', chunk(nbd.NBD_REPLY_TYPE_OFFSET_DATA, Buffer.alloc(8))],
    ['hole chunk of wrong size', chunk(nbd.NBD_REPLY_TYPE_OFFSET_HOLE, Buffer.alloc(13))],
    ['block status without extents', chunk(nbd.NBD_REPLY_TYPE_BLOCK_STATUS, Buffer.alloc(4))],
    ['block status with half an extent', chunk(nbd.NBD_REPLY_TYPE_BLOCK_STATUS, Buffer.alloc(16))],
    ['block status longer than the cap', tooLong],
    ['error chunk too short', chunk(nbd.NBD_REPLY_TYPE_ERROR, Buffer.alloc(5))],
    ['error message longer than its chunk', chunk(nbd.NBD_REPLY_TYPE_ERROR, Buffer.from([0, 0, 0, 5, 0, 1]))],
    ['empty chunk that does not end the reply', chunk(nbd.NBD_REPLY_TYPE_NONE, Buffer.alloc(0), 0)],
    ['unknown content chunk', chunk(99, Buffer.alloc(4))],
    ['offset of 2^53', chunk(nbd.NBD_REPLY_TYPE_OFFSET_HOLE, Buffer.from([0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]))],
  ])('%s breaks the protocol', (_name, bytes) => {
    expect(() => new ReplyParser(new Recorder()).push(bytes)).toThrow(expect.objectContaining({ code: 'NBD_PROTOCOL' }))
  })

  test('an unknown error chunk is an error like the others', () => {
    const recorder = new Recorder()
    new ReplyParser(recorder).push(chunk(0x8005, Buffer.from([0, 0, 0, 5, 0, 2, 0x68, 0x69, 9, 9, 9])))
    expect(recorder.events).toEqual([['error', 0, 0, nbd.NBD_EIO, 'hi'], ['end', 0, 0, '']])
  })
})
