import { open, readdir, readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from '@jest/globals'
import { RecordKind } from '../../core/record/index.ts'
import { loadVmState, SegmentSealer } from './index.ts'
import type { VmStore } from './index.ts'
import { buildFrame, DISKS, openReadyStore, openStore, temporaryDirectory } from './testing.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

/** Record `seq` writes its number over block `seq % 100` of disk 0. */
const write = (firstSeq: number, count: number, epoch = 1): Buffer =>
  buildFrame({ firstSeq, epoch, records: Array.from({ length: count }, (_, at) => ({ kind: RecordKind.write, offsetBytes: ((firstSeq + at) % 100) * 4096, fill: (firstSeq + at) & 255 })) })

const fill = async (store: VmStore, fromSeq: number, toSeq: number, epoch = 1): Promise<void> => {
  for (let seq = fromSeq; seq <= toSeq; seq += 10) store.accept(write(seq, Math.min(10, toSeq - seq + 1), epoch))
  await store.flush()
  await store.sealingIdle()
}
const block = async (directory: string, disk: number, at: number): Promise<Buffer> => (await readFile(join(directory, 'mirror', `${disk}.raw`))).subarray(at * 4096, (at + 1) * 4096)
const files = (directory: string): Promise<string[]> => readdir(join(directory, 'journal'))

describe('BaseKeeper', () => {
  test('moves the mirror to exactly one record, and no record behind it', async () => {
    await using directory = await temporaryDirectory()
    await using store = await openReadyStore(directory.path, sealer, { segmentRecords: 50 })
    await fill(store, 2, 400)
    await store.base.promote(255)
    for (let at = 0; at < 100; at++) {
      const newest = 255 - ((255 - at + 1000) % 100)
      expect((await block(directory.path, 0, at)).equals(Buffer.alloc(4096, newest & 255))).toBe(true)
    }
    expect(await loadVmState(join(directory.path, 'vm.json'))).toMatchObject({ baseSeq: 255, epoch: 1 })
    expect((await readFile(join(directory.path, 'vm.json'), 'utf8')).includes('promotingToSeq')).toBe(false)
    await store.base.promote(100)
    expect(store.baseSeq).toBe(255)
  })

  test('takes away what lies at or below the base, oldest first, and the rest verifies, opens and goes on', async () => {
    await using directory = await temporaryDirectory()
    {
      await using store = await openReadyStore(directory.path, sealer, { segmentRecords: 50 })
      await fill(store, 2, 400)
      const before = store.segments.length
      // The last record of a segment: it goes, too.
      const target = store.segments[3].lastSeq
      await store.base.promote(target)
      const { journalBytes } = store
      const removed: string[] = []
      store.onRemoved = async (path) => void removed.push(path)
      const freedBytes = await store.base.trim()
      expect(removed.length).toBe(4)
      expect(removed).toEqual([...removed].sort())
      expect(store.segments.length).toBe(before - 4)
      expect(store.journalBytes).toBe(journalBytes - freedBytes)
      expect((await files(directory.path)).length).toBe(store.segments.length)
      expect(await store.verify()).toMatchObject({ segments: before - 4, damage: [] })
      await expect(store.readFrame(0, 128)).rejects.toMatchObject({ code: 'NOT_FOUND' })
    }
    await using store = await openStore(directory.path, sealer, { segmentRecords: 50 })
    expect(store.damage()).toEqual([])
    await store.resumeEpoch(1)
    await fill(store, 401, 520)
    expect((await store.verify()).damage).toEqual([])
    await store.base.promote(520)
    await store.base.trim()
    // The newest one stays: numbers and chain go on from it.
    expect(store.segments.length).toBe(1)
    await fill(store, 521, 700)
    expect((await store.verify()).damage).toEqual([])
  })

  test('a target beyond the journal, or below a promotion that began, is refused and changes nothing', async () => {
    await using directory = await temporaryDirectory()
    await using store = await openReadyStore(directory.path, sealer)
    await fill(store, 2, 100)
    await expect(store.base.promote(101)).rejects.toMatchObject({ code: 'NOT_FOUND' })
    expect(store.base.promotingToSeq).toBeUndefined()
    const abort = new AbortController()
    await expect(store.base.promote(60, { batchBytes: 1, signal: abort.signal, pace: async () => abort.abort() })).rejects.toMatchObject({ code: 'ABORTED' })
    expect([store.base.promotingToSeq, store.base.recoverableFromSeq, store.baseSeq]).toEqual([60, 60, 1])
    await expect(store.base.promote(50)).rejects.toMatchObject({ code: 'CONFLICT' })
    // A later one includes it.
    await store.base.promote(80)
    expect([store.base.promotingToSeq, store.baseSeq]).toEqual([undefined, 80])
  })

  test('damage is found before anything is given up', async () => {
    await using directory = await temporaryDirectory()
    await using store = await openReadyStore(directory.path, sealer, { segmentRecords: 50 })
    await fill(store, 2, 300)
    const damaged = store.segments[3]
    const file = await open(damaged.path, 'r+')
    await file.write(Buffer.from('x'), 0, 1, 5000)
    await file.close()
    await store.base.check(damaged.firstSeq - 1)
    await expect(store.base.check(300)).rejects.toMatchObject({ code: 'JOURNAL_DAMAGED' })
    expect(store.base.firstDamagedSeq).toBeGreaterThanOrEqual(damaged.firstSeq)
    await expect(store.base.promote(300)).rejects.toMatchObject({ code: 'JOURNAL_DAMAGED' })
    expect(store.base.promotingToSeq).toBeUndefined()
    await store.base.promote(damaged.firstSeq - 1)
    await store.base.trim()
    expect(store.segments[0]).toBe(damaged)
  })

  test('disks that grew, and disks that are no longer there, are promoted like any other', async () => {
    await using directory = await temporaryDirectory()
    await using store = await openReadyStore(directory.path, sealer)
    const grownBytes = 6 * 1024 * 1024
    store.accept(buildFrame({ firstSeq: 2, records: [{ kind: RecordKind.resize, disk: 1, offsetBytes: grownBytes }, { kind: RecordKind.write, disk: 1, offsetBytes: grownBytes - 4096, fill: 7 }] }))
    await store.flush()
    await store.beginEpoch([DISKS[0]])
    await fill(store, 4, 20, 2)
    await store.base.promote(20)
    expect((await stat(join(directory.path, 'mirror/1.raw'))).size).toBe(grownBytes)
    expect((await block(directory.path, 1, grownBytes / 4096 - 1)).equals(Buffer.alloc(4096, 7))).toBe(true)
    expect(store.disks).toEqual([DISKS[0]])
  })

  test('attaches and commits go on beside it, and neither loses what the other wrote into vm.json', async () => {
    await using directory = await temporaryDirectory()
    await using store = await openReadyStore(directory.path, sealer, { segmentRecords: 50 })
    await fill(store, 2, 200)
    let epoch = 1
    await store.base.promote(150, {
      batchBytes: 40_000,
      pace: async () => {
        if (epoch < 4) epoch = (await store.beginEpoch(DISKS)).epoch
      },
    })
    expect(epoch).toBe(4)
    expect(await loadVmState(join(directory.path, 'vm.json'))).toMatchObject({ baseSeq: 150, epoch: 4 })
    await fill(store, 201, 220, 4)
    expect(store.durableSeq).toBe(220)
  })

  test('a store that closes ends it; it is done again after the next open', async () => {
    await using directory = await temporaryDirectory()
    let ended: unknown
    {
      const store = await openReadyStore(directory.path, sealer)
      await fill(store, 2, 100)
      let closing: Promise<void> | undefined
      ended = await store.base.promote(90, {
        batchBytes: 1,
        pace: async () => {
          closing ??= store[Symbol.asyncDispose]()
        },
      }).catch((error: unknown) => error)
      await closing
      await expect(store.base.promote(95)).rejects.toMatchObject({ code: 'CLOSED' })
    }
    expect(ended).toMatchObject({ code: 'CLOSED' })
    await using store = await openStore(directory.path, sealer)
    expect([store.baseSeq, store.base.promotingToSeq]).toEqual([1, 90])
    await store.base.promote(90)
    expect((await block(directory.path, 0, 90)).equals(Buffer.alloc(4096, 90))).toBe(true)
  })
})
