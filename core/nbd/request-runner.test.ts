import { describe, expect, test } from '@jest/globals'
import * as nbd from './constants.ts'
import type { NbdExport } from './export.ts'
import { MemoryExport } from './memory-export.ts'
import { ReplyParser } from './reply-parser.ts'
import { runRequest, type NbdRequest } from './request-runner.ts'
import type { NegotiatedSession } from './server-handshake.ts'

const BLOCK = 4096
const structured: NegotiatedSession = { exportName: 'disk', structuredReplies: true, metaContexts: [nbd.BASE_ALLOCATION] }
const never = new AbortController().signal

const of = (type: number, offsetBytes: number, lengthBytes: number, flags = 0): NbdRequest =>
  ({ type, flags, cookieHigh: 5, cookieLow: 6, offsetBytes, lengthBytes })

/** Runs a request and reads its reply as a client does: one line a chunk. */
const answer = async (served: NbdExport, request: NbdRequest, session = structured): Promise<unknown[]> => {
  const events: unknown[] = []
  const parser = new ReplyParser({
    onSimpleReply: (error) => (events.push(['simple', error]), 0),
    onData: (_high, _low, offsetBytes, lengthBytes) => void events.push(['data', offsetBytes, lengthBytes]),
    onPayload: () => undefined,
    onHole: (_high, _low, offsetBytes, lengthBytes) => void events.push(['hole', offsetBytes, lengthBytes]),
    onBlockStatus: (_high, _low, id, extents) => void events.push(['status', id, ...extents.map((extent) => [extent.lengthBytes, extent.flags])]),
    onError: (_high, _low, error, message) => void events.push(['error', error, message]),
    onReplyEnd: (high, low) => void events.push(['end', high, low]),
  })
  const reply = await runRequest(served, session, request, never)
  for (const part of reply.send) parser.push(Buffer.from(part))
  expect(events.at(-1)).toEqual(['end', 5, 6])
  expect(reply.error).toBe(events.some((event) => Array.isArray(event) && (event[0] === 'error' || (event[0] === 'simple' && event[1] !== 0))))
  return events.slice(0, -1)
}

const striped = (sizeBytes: number): MemoryExport => {
  const disk = new MemoryExport({ name: 'disk', sizeBytes, sparseReads: true })
  for (let at = 0; at < sizeBytes; at += 2 * BLOCK) disk.bytes.fill(1, at, at + BLOCK)
  return disk
}

describe('reads', () => {
  test('sparse ones are cut at the edges of the range, and sent whole with DF or when they fall into too many pieces', async () => {
    const disk = striped(1024 * BLOCK)
    expect(await answer(disk, of(nbd.NBD_CMD_READ, BLOCK - 10, 2 * BLOCK))).toEqual([
      ['data', BLOCK - 10, 10], ['hole', BLOCK, BLOCK], ['data', 2 * BLOCK, BLOCK - 10],
    ])
    expect(await answer(disk, of(nbd.NBD_CMD_READ, 0, 4 * BLOCK, nbd.NBD_CMD_FLAG_DF))).toEqual([['data', 0, 4 * BLOCK]])
    expect(await answer(disk, of(nbd.NBD_CMD_READ, 0, 64 * BLOCK))).toHaveLength(64)
    expect(await answer(disk, of(nbd.NBD_CMD_READ, 0, 65 * BLOCK))).toEqual([['data', 0, 65 * BLOCK]])
  })

  test('of no bytes succeed without data', async () => {
    expect(await answer(striped(BLOCK), of(nbd.NBD_CMD_READ, 0, 0))).toEqual([])
    expect(await answer(striped(BLOCK), of(nbd.NBD_CMD_READ, 0, 0), { ...structured, structuredReplies: false, metaContexts: [] })).toEqual([['simple', 0]])
  })
})

describe('block status', () => {
  const withExtents = (extents: Record<string, { lengthBytes: number; flags: number }[]>): MemoryExport => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: 1 << 30 })
    disk.blockStatus = async (context) => extents[context] ?? []
    return disk
  }
  const two: NegotiatedSession = { ...structured, metaContexts: ['a:x', 'b:y'] }

  test('has one chunk a context, numbered as negotiated; extents end with the request and are never empty', async () => {
    const disk = withExtents({
      'a:x': [{ lengthBytes: 512, flags: 1 }, { lengthBytes: 0, flags: 2 }, { lengthBytes: 2 ** 40, flags: 3 }],
      'b:y': [{ lengthBytes: 100, flags: 0 }],
    })
    expect(await answer(disk, of(nbd.NBD_CMD_BLOCK_STATUS, 0, 1 << 20), two)).toEqual([['status', 1, [512, 1], [(1 << 20) - 512, 3]], ['status', 2, [100, 0]]])
    const onlyOne = of(nbd.NBD_CMD_BLOCK_STATUS, 0, 1 << 20, nbd.NBD_CMD_FLAG_REQ_ONE)
    expect(await answer(disk, onlyOne, two)).toEqual([['status', 1, [512, 1]], ['status', 2, [100, 0]]])
  })

  test('without a context, without a length or from an export that has none is an error', async () => {
    const disk = withExtents({})
    const without = { ...structured, metaContexts: [] }
    expect(await answer(disk, of(nbd.NBD_CMD_BLOCK_STATUS, 0, 512), without)).toEqual([['error', nbd.NBD_EINVAL, expect.any(String)]])
    expect(await answer(disk, of(nbd.NBD_CMD_BLOCK_STATUS, 0, 0))).toEqual([['error', nbd.NBD_EINVAL, expect.any(String)]])
    expect(await answer(disk, of(nbd.NBD_CMD_BLOCK_STATUS, 0, 512))).toEqual([['error', nbd.NBD_EIO, 'the export has no status for base:allocation']])
  })

  test('a reply holds at most 64 Ki extents', async () => {
    const disk = withExtents({ [nbd.BASE_ALLOCATION]: Array.from({ length: 70_000 }, (_, index) => ({ lengthBytes: 512, flags: index & 1 })) })
    const [status] = await answer(disk, of(nbd.NBD_CMD_BLOCK_STATUS, 0, 1 << 30))
    expect(status).toHaveLength(2 + 65_536)
  })
})

describe('writes', () => {
  test('flags reach the export as what they mean', async () => {
    const disk = new MemoryExport({ name: 'disk', sizeBytes: 1 << 20 })
    const calls: unknown[] = []
    disk.write = async (offsetBytes, data, fua?: boolean) => void calls.push(['write', offsetBytes, data.length, fua])
    disk.trim = async (offsetBytes, lengthBytes, fua?: boolean) => void calls.push(['trim', offsetBytes, lengthBytes, fua])
    disk.writeZeroes = async (offsetBytes, lengthBytes, how?: object) => void calls.push(['zeroes', offsetBytes, lengthBytes, how])
    const { NBD_CMD_FLAG_FUA: FUA, NBD_CMD_FLAG_NO_HOLE: NO_HOLE, NBD_CMD_FLAG_FAST_ZERO: FAST } = nbd
    const requests = [
      { ...of(nbd.NBD_CMD_WRITE, 1, 3), data: Buffer.alloc(3) }, { ...of(nbd.NBD_CMD_WRITE, 1, 3, FUA), data: Buffer.alloc(3) },
      of(nbd.NBD_CMD_TRIM, 2, 4, FUA),
      of(nbd.NBD_CMD_WRITE_ZEROES, 0, 8), of(nbd.NBD_CMD_WRITE_ZEROES, 0, 8, NO_HOLE | FUA | FAST), of(nbd.NBD_CMD_WRITE_ZEROES, 0, 0),
    ]
    for (const request of requests) expect(await answer(disk, request)).toEqual([['simple', 0]])
    expect(calls).toEqual([
      ['write', 1, 3, false], ['write', 1, 3, true], ['trim', 2, 4, true],
      ['zeroes', 0, 8, { mayTrim: true, fua: false, fast: false }], ['zeroes', 0, 8, { mayTrim: false, fua: true, fast: true }],
    ])
  })

  test('what an export does not have is refused', async () => {
    const plain: NbdExport = {
      name: 'disk', sizeBytes: 1 << 20, readOnly: false, canMultiConn: false, metaContexts: [],
      blockSize: { minBytes: 1, preferredBytes: BLOCK, maxBytes: BLOCK },
      read: async (_offsetBytes, lengthBytes) => [Buffer.alloc(lengthBytes)],
    }
    for (const type of [nbd.NBD_CMD_WRITE, nbd.NBD_CMD_TRIM, nbd.NBD_CMD_WRITE_ZEROES, nbd.NBD_CMD_FLUSH, nbd.NBD_CMD_BLOCK_STATUS]) {
      expect(await answer(plain, of(type, 0, type === nbd.NBD_CMD_FLUSH ? 0 : 512))).toEqual([['error', nbd.NBD_EINVAL, expect.any(String)]])
    }
    const slow = new MemoryExport({ name: 'disk', sizeBytes: BLOCK })
    const noFast: NbdExport = Object.assign(slow, { fastZero: false })
    expect(await answer(noFast, of(nbd.NBD_CMD_WRITE_ZEROES, 0, 512, nbd.NBD_CMD_FLAG_FAST_ZERO))).toEqual([['error', nbd.NBD_EINVAL, expect.any(String)]])
    expect(await answer(plain, of(nbd.NBD_CMD_READ, 0, BLOCK + 1))).toEqual([['error', nbd.NBD_EINVAL, expect.any(String)]])
  })
})
