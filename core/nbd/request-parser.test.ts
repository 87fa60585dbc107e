import { describe, expect, test } from '@jest/globals'
import * as nbd from './constants.ts'
import { RequestParser, type RequestSink } from './request-parser.ts'
import { randomChunks, seededIntegers } from './seeded.ts'

type Request = { type: number; flags: number; cookie: [number, number]; offsetHigh: number; offsetLow: number; data?: Buffer; lengthBytes: number }

const encode = (request: Request): Buffer => {
  const header = Buffer.alloc(28)
  header.writeUInt32BE(nbd.NBD_REQUEST_MAGIC, 0)
  header.writeUInt16BE(request.flags, 4)
  header.writeUInt16BE(request.type, 6)
  header.writeUInt32BE(request.cookie[0], 8)
  header.writeUInt32BE(request.cookie[1], 12)
  header.writeUInt32BE(request.offsetHigh, 16)
  header.writeUInt32BE(request.offsetLow, 20)
  header.writeUInt32BE(request.lengthBytes, 24)
  return Buffer.concat([header, request.data ?? Buffer.alloc(0)])
}

const write = (lengthBytes: number): Request => ({
  type: nbd.NBD_CMD_WRITE, flags: 0, cookie: [1, 2], offsetHigh: 0, offsetLow: 4096, lengthBytes, data: Buffer.alloc(lengthBytes, 0x5a),
})
const read: Request = { type: nbd.NBD_CMD_READ, flags: 0, cookie: [3, 4], offsetHigh: 0, offsetLow: 0, lengthBytes: 1 << 30 }

/** Writes events down; payload pieces are joined, since their cuts follow the chunks. */
class Recorder implements RequestSink {
  readonly events: unknown[] = []
  payload: Buffer[] = []

  onRequest(...fields: [number, number, number, number, number, number]): void {
    this.events.push(['request', ...fields])
  }

  onPayload(chunk: Buffer, start: number, end: number): void {
    if (end <= start) throw new RangeError('an empty piece of payload')
    this.payload.push(Buffer.from(chunk.subarray(start, end)))
  }

  onRequestEnd(): void {
    this.events.push(['end', Buffer.concat(this.payload).toString('hex')])
    this.payload = []
  }
}

const parserFor = (sink: RequestSink): RequestParser => new RequestParser(sink, { maxPayloadBytes: 64 * 1024 })

describe('RequestParser', () => {
  test('gives the same events for any chunking', () => {
    const seed = Date.now() >>> 0
    console.log(`seed ${seed}`)
    const below = seededIntegers(seed)
    for (let round = 0; round < 40; round++) {
      const requests = Array.from({ length: 1 + below(30) }, (): Request => {
        const type = below(10)
        const lengthBytes = type === nbd.NBD_CMD_WRITE ? [0, 1, 512, 4096, below(9000)][below(5)] ?? 0 : below(0xffff_ffff)
        return {
          type, flags: below(32), cookie: [below(0xffff_ffff), below(0xffff_ffff)], offsetHigh: below(0x20_0000), offsetLow: below(0xffff_ffff), lengthBytes,
          ...(type === nbd.NBD_CMD_WRITE ? { data: Buffer.from(Array.from({ length: lengthBytes }, () => below(256))) } : {}),
        }
      })
      const bytes = Buffer.concat(requests.map(encode))
      const expected = requests.flatMap((request) => [
        ['request', request.type, request.flags, ...request.cookie, request.offsetHigh * 2 ** 32 + request.offsetLow, request.lengthBytes],
        ['end', request.data?.toString('hex') ?? ''],
      ])
      for (const longestBytes of [1, 29, 5000, bytes.length]) {
        const recorder = new Recorder()
        const parser = parserFor(recorder)
        for (const chunk of randomChunks(bytes, below, longestBytes)) parser.push(chunk)
        expect(recorder.events).toEqual(expected)
        expect(parser.atRequestBoundary).toBe(true)
      }
    }
  })

  test('payload may bypass the parser by advancePayload', () => {
    const recorder = new Recorder()
    const parser = parserFor(recorder)
    parser.push(encode(write(1000)), 0, 28 + 100)
    expect(parser.payloadPendingBytes).toBe(900)
    parser.advancePayload(0)
    parser.advancePayload(899)
    expect(recorder.events).toHaveLength(1)
    parser.advancePayload(1)
    expect(recorder.events).toHaveLength(2)
    expect(parser.payloadPendingBytes).toBe(0)
    parser.push(encode(read))
    expect(recorder.events).toHaveLength(4)
    expect(() => parser.advancePayload(1)).toThrow(expect.objectContaining({ code: 'INTERNAL' }))
  })

  test('parses only start..end of a chunk', () => {
    const recorder = new Recorder()
    const bytes = Buffer.concat([Buffer.alloc(7, 0xff), encode(write(16)), Buffer.alloc(9, 0xff)])
    parserFor(recorder).push(bytes, 7, bytes.length - 9)
    expect(recorder.events).toEqual([['request', nbd.NBD_CMD_WRITE, 0, 1, 2, 4096, 16], ['end', '5a'.repeat(16)]])
  })

  test('an offset of 2^53 - 1 is taken, one of 2^53 is not', () => {
    const recorder = new Recorder()
    parserFor(recorder).push(encode({ ...read, offsetHigh: 0x1f_ffff, offsetLow: 0xffff_ffff }))
    expect(recorder.events[0]).toEqual(['request', nbd.NBD_CMD_READ, 0, 3, 4, Number.MAX_SAFE_INTEGER, 1 << 30])
    expect(() => parserFor(recorder).push(encode({ ...read, offsetHigh: 0x20_0000 }))).toThrow(expect.objectContaining({ code: 'NBD_PROTOCOL' }))
  })

  test('a write above the cap and a wrong magic break the stream for good', () => {
    const tooLong = encode(write(16))
    tooLong.writeUInt32BE(64 * 1024 + 1, 24)
    const wrongMagic = encode(read)
    wrongMagic[0] = 0
    for (const bytes of [tooLong, wrongMagic]) {
      const recorder = new Recorder()
      const parser = parserFor(recorder)
      expect(() => parser.push(bytes)).toThrow(expect.objectContaining({ code: 'NBD_PROTOCOL' }))
      expect(() => parser.push(encode(read))).toThrow(expect.objectContaining({ code: 'NBD_PROTOCOL' }))
      expect(recorder.events).toEqual([])
    }
    const longest = encode({ ...write(16), data: Buffer.alloc(0) })
    longest.writeUInt32BE(64 * 1024, 24)
    const parser = parserFor(new Recorder())
    parser.push(longest)
    expect(parser.payloadPendingBytes).toBe(64 * 1024)
  })
})
