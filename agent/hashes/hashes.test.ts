import { createHash } from 'node:crypto'
import { mkdir, mkdtemp, open, readdir, readlink, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { CdpError } from '../../core/errors/index.ts'
import { HASH_BYTES, HashMark, MAX_HASH_REQUESTS } from '../../core/stream/index.ts'
import type { HashRequest } from '../../core/stream/index.ts'
import { PinRegistry } from '../recovery/index.ts'
import { mirrorHasData } from '../mirror/index.ts'
import { HashDesk, hashExtents } from './index.ts'
import { ReaderCache } from './reader-cache.ts'

const EXTENT = 65_536
const MiB = 1024 * 1024
const SIZE_BYTES = 4 * MiB + 512
let directory = ''
beforeEach(async () => {
  directory = await mkdtemp('/tmp/cdp-h-')
})
afterEach(() => rm(directory, { recursive: true, force: true }))

const sha256 = (bytes: Uint8Array): Buffer => createHash('sha256').update(bytes).digest()
const request = (more: Partial<HashRequest> = {}): HashRequest => ({ requestId: 1, disk: 0, asOfSeq: 0, offsetBytes: 0, extentBytes: EXTENT, extentCount: 4, ...more })

/** A VM whose first copy has not ended: a mirror and vm.json, which is all that hashes are made of then. */
const makeVm = async (name: string, bytes: Buffer): Promise<string> => {
  const vm = join(directory, name)
  await mkdir(join(vm, 'mirror'), { recursive: true })
  await writeFile(join(vm, 'mirror/0.raw'), bytes)
  await writeFile(join(vm, 'vm.json'), JSON.stringify({ format: 1, vm: name, epoch: 1, baseComplete: false, baseSeq: 0, directSeq: 0, syncProgress: {}, disks: [{ disk: 0, key: 'scsi0', sizeBytes: SIZE_BYTES }] }))
  return vm
}

describe('hashExtents', () => {
  const content = Buffer.alloc(SIZE_BYTES)
  content.fill(7, EXTENT, EXTENT + 1)
  content.fill(8, 2 * MiB - 100, 2 * MiB + 100)
  content.fill(9, 4 * MiB, SIZE_BYTES)
  const reads: { offsetBytes: number; lengthBytes: number }[] = []
  const reader = (damagedAt = -1, holes = false, damage: Error = new CdpError('JOURNAL_DAMAGED', 'bits rot')) => ({
    disks: [{ disk: 0, key: 'scsi0', sizeBytes: SIZE_BYTES }],
    blockStatus: async (_disk: number, offsetBytes: number, lengthBytes: number) => {
      if (!holes) return [{ lengthBytes: Math.min(lengthBytes, 100_000 - (100_000 % 512)), isHole: false }]
      // One sector of data in a sea of holes.
      if (offsetBytes < 2 * MiB) return [{ lengthBytes: Math.min(lengthBytes, 2 * MiB - offsetBytes), isHole: true }]
      return [{ lengthBytes: Math.min(lengthBytes, 512), isHole: false }, ...(lengthBytes > 512 ? [{ lengthBytes: lengthBytes - 512, isHole: true }] : [])]
    },
    read: async (_disk: number, offsetBytes: number, lengthBytes: number) => {
      reads.push({ offsetBytes, lengthBytes })
      if (damagedAt >= offsetBytes && damagedAt < offsetBytes + lengthBytes) throw damage
      const middle = offsetBytes + Math.floor(lengthBytes / 1024) * 512
      return [content.subarray(offsetBytes, middle), content.subarray(middle, offsetBytes + lengthBytes)]
    },
    [Symbol.asyncDispose]: async () => undefined,
  })
  const whole = { disk: 0, offsetBytes: 0, extentBytes: EXTENT, extentCount: 65 }

  test('marks zeroes, hashes the rest in order, and ends with the disk', async () => {
    const { marks, hashes } = await hashExtents(reader(), whole)
    expect(Array.from(marks, (mark, extent) => (mark === HashMark.hash ? extent : -1)).filter((extent) => extent >= 0)).toEqual([1, 31, 32, 64])
    expect(hashes.length).toBe(4 * HASH_BYTES)
    expect(hashes.subarray(0, 32).equals(sha256(content.subarray(EXTENT, 2 * EXTENT)))).toBe(true)
    expect(hashes.subarray(96).equals(sha256(content.subarray(4 * MiB)))).toBe(true)
  })

  test('a hole is not read', async () => {
    reads.length = 0
    const { marks } = await hashExtents(reader(-1, true), whole)
    expect(reads).toEqual([{ offsetBytes: 2 * MiB, lengthBytes: EXTENT }])
    expect(marks[32]).toBe(HashMark.hash)
  })

  test.each([new CdpError('JOURNAL_DAMAGED', 'bits rot'), Object.assign(new Error('i/o error'), { code: 'EIO' })])('damage ($code) makes its own extent unknown, and nothing around it', async (damage) => {
    const { marks, hashes } = await hashExtents(reader(2 * MiB + 5, false, damage), whole)
    expect(Array.from(marks, (mark, extent) => (mark === HashMark.unknown ? extent : -1)).filter((extent) => extent >= 0)).toEqual([32])
    expect(hashes.length).toBe(3 * HASH_BYTES)
  })

  test('any other failure is one', async () => {
    await expect(hashExtents(reader(0, false, Object.assign(new Error('too many'), { code: 'EMFILE' })), whole)).rejects.toMatchObject({ code: 'EMFILE' })
  })

  test.each([{ disk: 1 }, { offsetBytes: 4 * MiB, extentCount: 2 }, { extentCount: 66 }])('outside the disk is refused: %j', async (more) => {
    await expect(hashExtents(reader(), { ...whole, ...more })).rejects.toMatchObject({ code: 'BAD_INPUT' })
  })
})

describe('HashDesk', () => {
  test('answers from the mirror while the base is incomplete; streams take turns; pins go with the stream', async () => {
    const bytes = Buffer.alloc(SIZE_BYTES, 3)
    const pins = new PinRegistry()
    await using desk = new HashDesk({ pins })
    const asker = async (name: string) => ({ vmDirectory: await makeVm(name, bytes), reason: name, durableSeq: () => 0, baseComplete: () => false })
    const busy = desk.open(await asker('a'))
    const late = desk.open(await asker('b'))
    const order: string[] = []
    const asked = Array.from({ length: 6 }, (_, n) => busy.ask(request({ offsetBytes: n * EXTENT })).then(() => order.push('a')))
    asked.push(late.ask(request()).then(() => order.push('b')))
    expect(pins.list().map(({ reason }) => reason)).toEqual(['a', 'b'])
    await Promise.all(asked)
    expect(order.indexOf('b')).toBeLessThan(3)
    const { marks, hashes } = await late.ask(request({ offsetBytes: 4 * MiB, extentCount: 1 }))
    expect([Array.from(marks), hashes.equals(sha256(bytes.subarray(0, 512)))]).toEqual([[HashMark.hash], true])
    late.rest()
    expect(pins.list().map(({ reason }) => reason)).toEqual(['a'])
    busy[Symbol.dispose]()
    expect(pins.list()).toEqual([])
    await expect(late.ask(request({ disk: 5 }))).rejects.toMatchObject({ code: 'BAD_INPUT' })
  })

  test('takes so many requests of a stream and no more; a stream that ends takes them with it, the others go on', async () => {
    await using desk = new HashDesk({ pins: new PinRegistry() })
    const vmDirectory = await makeVm('a', Buffer.alloc(SIZE_BYTES, 3))
    const asker = { vmDirectory, reason: 'x', durableSeq: () => 0, baseComplete: () => false }
    const ending = desk.open(asker)
    const other = desk.open(asker)
    const asked = Array.from({ length: MAX_HASH_REQUESTS }, () => ending.ask(request({ extentCount: 64 })))
    await expect(ending.ask(request())).rejects.toMatchObject({ code: 'STREAM_PROTOCOL' })
    const answered = other.ask(request())
    ending[Symbol.dispose]()
    const outcomes = await Promise.allSettled(asked)
    expect(outcomes.filter(({ status }) => status === 'rejected').length).toBeGreaterThanOrEqual(MAX_HASH_REQUESTS - 1)
    expect((await answered).marks).toHaveLength(4)
    await desk[Symbol.asyncDispose]()
    await expect(other.ask(request())).rejects.toMatchObject({ code: 'CLOSED' })
  })

  test('a sequence that is not durable is not in the history yet; a replica that is not there is an error, and the worker goes on', async () => {
    await using desk = new HashDesk({ pins: new PinRegistry() })
    const vmDirectory = await makeVm('a', Buffer.alloc(SIZE_BYTES, 3))
    using lane = desk.open({ vmDirectory, reason: 'x', durableSeq: () => 9, baseComplete: () => true })
    await expect(lane.ask(request({ asOfSeq: 10 }))).rejects.toMatchObject({ code: 'NOT_FOUND' })
    using gone = desk.open({ vmDirectory: join(directory, 'none'), reason: 'x', durableSeq: () => 9, baseComplete: () => true })
    await expect(gone.ask(request({ asOfSeq: 9 }))).rejects.toMatchObject({ code: 'NOT_FOUND' })
    expect((await lane.ask(request({ asOfSeq: 9 }))).marks).toHaveLength(4)
  })
})

test('with the last reader every file is closed: a replica that was deleted and made anew is not mistaken for the old one', async () => {
  const vm = await makeVm('a', Buffer.alloc(SIZE_BYTES, 3))
  await using readers = new ReaderCache()
  const range = { disk: 0, offsetBytes: 0, extentBytes: EXTENT, extentCount: 1 }
  const before = await hashExtents(await readers.get('1', vm, 0), range)
  const openFiles = async (): Promise<string[]> => (await Promise.all((await readdir('/proc/self/fd')).map((fd) => readlink(`/proc/self/fd/${fd}`).catch(() => '')))).filter((path) => path.startsWith(directory))
  expect(await openFiles()).toHaveLength(1)
  await readers.close('1')
  expect(await openFiles()).toEqual([])
  await rm(vm, { recursive: true })
  await makeVm('a', Buffer.alloc(SIZE_BYTES, 4))
  const after = await hashExtents(await readers.get('2', vm, 0), range)
  expect(after.hashes.equals(sha256(Buffer.alloc(EXTENT, 4)))).toBe(true)
  expect(after.hashes.equals(before.hashes)).toBe(false)
  for (let n = 3; n < 40; n++) await readers.get(String(n), vm, 0)
  await readers.close('never there')
})

test('a mirror of holes has no data; one byte is some', async () => {
  const vm = await makeVm('a', Buffer.alloc(0))
  const disks = [{ disk: 0, key: 'scsi0', sizeBytes: SIZE_BYTES }, { disk: 1, key: 'scsi1', sizeBytes: 512 }]
  expect(await mirrorHasData(vm, disks)).toBe(false)
  await using file = await open(join(vm, 'mirror/0.raw'), 'r+')
  await file.write(Buffer.of(1), 0, 1, MiB)
  await file.datasync()
  expect(await mirrorHasData(vm, disks)).toBe(true)
})
