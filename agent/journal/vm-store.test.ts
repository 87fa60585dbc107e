import { readdir, readFile, rm, stat, utimes } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from '@jest/globals'
import { adaptiveZstd, RecordKind } from '../../core/record/index.ts'
import { SegmentSealer } from './index.ts'
import type { JournalMark, VmStore } from './index.ts'
import { buildFrame, DISKS, openReadyStore, openStore, syncEndFrame, temporaryDirectory } from './testing.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

const write = (firstSeq: number, fill: number, count = 1, epoch = 1): Buffer =>
  buildFrame({ firstSeq, epoch, records: Array.from({ length: count }, (_, at) => ({ kind: RecordKind.write, offsetBytes: (firstSeq + at) * 4096, fill })) })

const sequencesOf = async (store: VmStore): Promise<number[]> => {
  const sequences: number[] = []
  for (const { segmentNumber } of store.segments) {
    for await (const { header, frameOffset } of store.recordsOf(segmentNumber)) {
      const { payload } = await store.readFrame(segmentNumber, frameOffset)
      expect(payload.length).toBe(header.payloadRawBytes)
      for (let seq = header.firstSeq; seq <= header.lastSeq; seq++) sequences.push(seq)
    }
  }
  return sequences
}

describe('VmStore', () => {
  test('what was acknowledged is there after a reopen, in segments that are sealed and chained', async () => {
    await using directory = await temporaryDirectory()
    const acknowledged: number[] = []
    {
      await using store = await openReadyStore(directory.path, sealer, { segmentRecords: 10 })
      store.onDurable = (seq) => acknowledged.push(seq)
      for (let seq = 2; seq < 62; seq += 3) store.accept(write(seq, seq & 255, 3))
      expect(store.receivedSeq).toBe(61)
      await store.flush()
      expect(store.durableSeq).toBe(61)
      await store.sealingIdle()
      expect(store.segments.map((one) => one.sealed)).toEqual([true, true, true, true, true, true, false])
    }
    expect(acknowledged.at(-1)).toBe(61)
    await using store = await openStore(directory.path, sealer, { segmentRecords: 10 })
    expect(store.durableSeq).toBe(61)
    expect(store.openReport.scannedBytes).toBeLessThan(30_000)
    expect(await sequencesOf(store)).toEqual(Array.from({ length: 60 }, (_, at) => at + 2))
    const [first, second] = store.segments
    expect(second.previousDigest.equals(first.digest ?? Buffer.alloc(0))).toBe(true)
    expect(await store.verify()).toMatchObject({ segments: 7, records: 60, damage: [] })
  })

  test.each([['nothing where all was promised', true], ['all of it where nothing was', false]])('what an fdatasync that failed may have left in the page cache only is written again before it is promised: %s', async (_, promised) => {
    await using directory = await temporaryDirectory()
    {
      await using store = await openReadyStore(directory.path, sealer)
      for (let seq = 2; seq < 20; seq += 2) store.accept(write(seq, seq, 2))
      await store.flush()
    }
    const [name] = (await readdir(join(directory.path, 'journal'))).filter((one) => one.endsWith('.seg'))
    const path = join(directory.path, 'journal', name)
    if (!promised) await rm(join(directory.path, 'durable.hint'))
    await utimes(path, 1, 1)
    const before = await readFile(path)
    await using store = await openStore(directory.path, sealer)
    expect([store.durableSeq, (await stat(path)).mtimeMs === 1_000]).toEqual([19, promised])
    expect((await readFile(path)).equals(before)).toBe(true)
  })

  test('frames sent again are skipped, a gap and a part of a held frame are refused', async () => {
    await using directory = await temporaryDirectory()
    await using store = await openReadyStore(directory.path, sealer)
    for (const twice of [1, 2]) {
      for (let seq = 2; seq < 20; seq += 2) store.accept(write(seq, twice, 2))
    }
    await store.flush()
    expect(await sequencesOf(store)).toEqual(Array.from({ length: 18 }, (_, at) => at + 2))
    expect(() => store.accept(write(21, 1))).toThrow(expect.objectContaining({ code: 'STREAM_PROTOCOL', message: 'gap in the sequence' }))
    expect(() => store.accept(write(19, 1, 2))).toThrow(expect.objectContaining({ code: 'STREAM_PROTOCOL', message: 'frame of which a part is held' }))
    const broken = write(20, 1)
    broken[200] ^= 1
    expect(() => store.accept(broken)).toThrow(expect.objectContaining({ code: 'CHECKSUM' }))
    store.accept(write(20, 1))
    await store.flush()
    expect(store.durableSeq).toBe(20)
  })

  test('a new attach makes the old one stale, a reconnect of the newest goes on where it is durable', async () => {
    await using directory = await temporaryDirectory()
    await using store = await openReadyStore(directory.path, sealer)
    store.accept(write(2, 1))
    const answer = await store.beginEpoch(DISKS)
    expect(answer).toMatchObject({ epoch: 2, durableSeq: 2, baseComplete: true })
    expect(() => store.accept(write(3, 1))).toThrow(expect.objectContaining({ code: 'STALE_EPOCH' }))
    await expect(store.resumeEpoch(1)).rejects.toMatchObject({ code: 'STALE_EPOCH' })
    store.accept(write(3, 1, 1, 2))
    await expect(store.resumeEpoch(2)).resolves.toMatchObject({ epoch: 2, durableSeq: 3 })
    expect(() => store.accept(write(4, 1, 1, 9))).toThrow(expect.objectContaining({ code: 'STREAM_PROTOCOL' }))
  })

  test('disks that stay keep their numbers whatever is claimed, others get fresh ones; a refused attach changes nothing', async () => {
    await using directory = await temporaryDirectory()
    await using store = await openReadyStore(directory.path, sealer)
    await expect(store.beginEpoch([DISKS[0], DISKS[0]])).rejects.toMatchObject({ code: 'BAD_INPUT' })
    store.accept(write(2, 1))
    await expect(store.beginEpoch([DISKS[0]])).resolves.toMatchObject({ epoch: 2 })
    expect(() => store.accept(buildFrame({ firstSeq: 3, epoch: 2, records: [{ kind: RecordKind.zero, disk: 1 }] }))).toThrow('does not have')
    expect(() => store.accept(buildFrame({ firstSeq: 3, epoch: 2, records: [{ kind: RecordKind.zero, offsetBytes: DISKS[0].sizeBytes }] }))).toThrow('outside its disk')
    const { disks } = await store.beginEpoch([{ disk: 0, key: 'scsi7', sizeBytes: 512 }, { ...DISKS[0], disk: 1 }])
    expect(disks).toEqual([{ disk: 2, key: 'scsi7', sizeBytes: 512 }, DISKS[0]])
  })

  test('the initial sync is applied to the mirror, acknowledged with vm.json, and ends with syncEnd', async () => {
    await using directory = await temporaryDirectory()
    const direct = (firstSeq: number, records: Parameters<typeof buildFrame>[0]['records']): Buffer => buildFrame({ firstSeq, direct: true, records })
    {
      await using store = await openStore(directory.path, sealer)
      await store.beginEpoch(DISKS)
      expect(() => store.accept(write(1, 1))).toThrow('before the end of the initial sync')
      store.accept(direct(1, [
        { kind: RecordKind.sync, offsetBytes: 0, lengthBytes: 65_536, fill: 0xaa },
        { kind: RecordKind.write, offsetBytes: 4096, fill: 0xbb },
        { kind: RecordKind.zero, offsetBytes: 8192, lengthBytes: 4096 },
        { kind: RecordKind.syncProgress, offsetBytes: 65_536 },
      ]))
      await store.flush()
      expect(store).toMatchObject({ durableSeq: 4, baseComplete: false })
    }
    await using store = await openStore(directory.path, sealer)
    await expect(store.resumeEpoch(1)).resolves.toEqual({ epoch: 1, durableSeq: 4, baseComplete: false, syncProgress: { 0: 65_536 }, disks: DISKS })
    store.accept(direct(5, [{ kind: RecordKind.discard, offsetBytes: 12_288, lengthBytes: 4096 }]))
    store.accept(syncEndFrame(6))
    store.accept(write(7, 1))
    expect(() => store.accept(syncEndFrame(8))).toThrow('after the initial sync')
    await store.flush()
    expect(store).toMatchObject({ durableSeq: 7, baseComplete: true, baseSeq: 6 })
    expect(store.segments[0].firstSeq).toBe(7)
    const mirror = await readFile(join(directory.path, 'mirror/0.raw'))
    const expected = Buffer.alloc(DISKS[0].sizeBytes)
    expected.fill(0xaa, 0, 65_536).fill(0xbb, 4096, 8192).fill(0, 8192, 16_384)
    expect(mirror.equals(expected)).toBe(true)
    expect(await sequencesOf(store)).toEqual([7])
  })

  test('marks are told when they are durable and can be replayed from the journal', async () => {
    await using directory = await temporaryDirectory()
    const told: JournalMark[] = []
    const checkpoint = (id: string): unknown => ({ id, vpg: 'g', vms: ['a'], atUnixMs: 5, kind: 'automatic' })
    {
      await using store = await openReadyStore(directory.path, sealer, { segmentRecords: 4 })
      store.onRecords = (marks) => told.push(...marks)
      store.accept(buildFrame({ firstSeq: 2, records: [{ kind: RecordKind.epoch, json: { reason: 'initial', disks: DISKS } }], compress: adaptiveZstd() }))
      for (let seq = 3; seq < 15; seq += 2) {
        store.accept(buildFrame({ firstSeq: seq, records: [{ kind: RecordKind.write, fill: 1 }, { kind: RecordKind.checkpoint, offsetBytes: seq, json: checkpoint(`c${seq}`) }] }))
      }
      store.accept(buildFrame({ firstSeq: 15, records: [{ kind: RecordKind.resize, offsetBytes: 16 * 1024 * 1024 }, { kind: RecordKind.zero, offsetBytes: 15 * 1024 * 1024 }] }))
      await store.flush()
      expect(() => store.accept(buildFrame({ firstSeq: 17, records: [{ kind: RecordKind.checkpoint, json: { id: 1 } }] }))).toThrow(expect.objectContaining({ code: 'FORMAT' }))
    }
    expect(told.map((mark) => mark.seq)).toEqual([2, 4, 6, 8, 10, 12, 14, 15])
    expect(told[1]).toMatchObject({ is: 'checkpoint', seq: 4, namedSeq: 3, epoch: 1, mark: { id: 'c3' } })
    await using store = await openStore(directory.path, sealer)
    const replayed: JournalMark[] = []
    for await (const mark of store.marks()) replayed.push(mark)
    expect(replayed).toEqual(told)
    expect(store.disks[0].sizeBytes).toBe(16 * 1024 * 1024)
  })

  test('marks that are refused are not acknowledged: the store fails, and replays them when it is opened again', async () => {
    await using directory = await temporaryDirectory()
    const stopped = Promise.withResolvers<unknown>()
    const acknowledged: number[] = []
    {
      await using store = await openReadyStore(directory.path, sealer)
      store.onDurable = (seq) => acknowledged.push(seq)
      store.onStopped = stopped.resolve
      store.onRecords = () => {
        throw new Error('the catalogue is gone')
      }
      store.accept(write(2, 1))
      await store.flush()
      store.accept(buildFrame({ firstSeq: 3, records: [{ kind: RecordKind.checkpoint, json: { id: 'c', vpg: 'g', vms: [], atUnixMs: 1, kind: 'automatic' } }] }))
      expect(await stopped.promise).toMatchObject({ code: 'IO', context: { condition: 'failed' } })
      expect(() => store.accept(write(4, 1))).toThrow(expect.objectContaining({ code: 'IO' }))
      await expect(store.resumeEpoch(1)).rejects.toMatchObject({ code: 'IO' })
    }
    expect(acknowledged).toEqual([2])
    await using store = await openStore(directory.path, sealer)
    const replayed: number[] = []
    for await (const mark of store.marks(3)) replayed.push(mark.seq)
    expect(replayed).toEqual([3])
  })

  test('marks for which their database has no room make the store full: they are taken before they are acknowledged, and it goes on', async () => {
    await using directory = await temporaryDirectory()
    await using store = await openReadyStore(directory.path, sealer)
    const stopped = Promise.withResolvers<unknown>()
    const acknowledged: number[] = []
    let hasRoom = false
    let asked = 0
    store.onDurable = (seq) => acknowledged.push(seq)
    store.onStopped = stopped.resolve
    store.onRecords = () => {
      asked++
      if (!hasRoom) throw Object.assign(new Error('database or disk is full'), { code: 'ERR_SQLITE_ERROR', errcode: 13 })
    }
    store.accept(buildFrame({ firstSeq: 2, records: [{ kind: RecordKind.checkpoint, json: { id: 'c', vpg: 'g', vms: [], atUnixMs: 1, kind: 'automatic' } }] }))
    expect(await stopped.promise).toMatchObject({ code: 'IO', context: { condition: 'full' } })
    expect(store.condition).toBe('full')
    await expect(store.resumeEpoch(1)).rejects.toMatchObject({ context: { condition: 'full' } })
    expect({ asked, acknowledged }).toEqual({ asked: 2, acknowledged: [] })
    hasRoom = true
    expect(await store.resumeEpoch(1)).toMatchObject({ durableSeq: 2 })
    store.accept(write(3, 1))
    await store.flush()
    expect({ acknowledged, condition: store.condition }).toEqual({ acknowledged: [3], condition: 'open' })
  })

  test('more than the queue may hold is refused, and taken when there is room', async () => {
    await using directory = await temporaryDirectory()
    await using store = await openReadyStore(directory.path, sealer, { queueBytes: 1 })
    const big = (firstSeq: number): Buffer => buildFrame({ firstSeq, records: [{ kind: RecordKind.write, lengthBytes: 2 * 1024 * 1024, fill: 1 }] })
    store.accept(big(2))
    store.accept(big(3))
    expect(() => store.accept(big(4))).toThrow(expect.objectContaining({ code: 'CONFLICT', retry: true }))
    await store.flush()
    expect(store.queuedBytes).toBe(0)
    store.accept(big(4))
    await store.flush()
    expect(store.durableSeq).toBe(4)
  })

  test('reading keeps few files open and refuses places where no frame begins', async () => {
    await using directory = await temporaryDirectory()
    await using store = await openReadyStore(directory.path, sealer, { segmentRecords: 2, openFiles: 3 })
    for (let seq = 2; seq < 42; seq++) store.accept(write(seq, seq))
    await store.flush()
    expect(store.segments.length).toBe(20)
    const open = async (): Promise<number> => (await readdir('/proc/self/fd')).length
    const before = await open()
    await Promise.all(store.segments.map(({ segmentNumber }) => store.readFrame(segmentNumber, 128)))
    expect((await open()) - before).toBeLessThanOrEqual(4)
    await expect(store.readFrame(0, 200)).rejects.toMatchObject({ code: 'NOT_FOUND' })
    await expect(store.readFrame(0, 10 ** 9)).rejects.toMatchObject({ code: 'NOT_FOUND' })
    await expect(store.readFrame(77, 128)).rejects.toMatchObject({ code: 'NOT_FOUND' })
  })

  test('disposing twice, or while frames wait, loses nothing and refuses what comes later', async () => {
    await using directory = await temporaryDirectory()
    const store = await openReadyStore(directory.path, sealer)
    for (let seq = 2; seq < 200; seq++) store.accept(write(seq, seq))
    await Promise.all([store[Symbol.asyncDispose](), store[Symbol.asyncDispose]()])
    await store[Symbol.asyncDispose]()
    expect(() => store.accept(write(200, 1))).toThrow(expect.objectContaining({ code: 'CLOSED' }))
    await expect(store.beginEpoch(DISKS)).rejects.toMatchObject({ code: 'CLOSED' })
    await using again = await openStore(directory.path, sealer)
    expect(again.durableSeq).toBe(199)
  })
})
