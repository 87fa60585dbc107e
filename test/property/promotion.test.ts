import { cp, rm } from 'node:fs/promises'
import { afterAll, expect, test } from '@jest/globals'
import { FilePool, PageCache, RunMerger } from '../../agent/index/index.ts'
import { SegmentSealer } from '../../agent/journal/index.ts'
import type { VmStore } from '../../agent/journal/index.ts'
import { buildFrame, DISKS, openReadyStore, openStore, temporaryDirectory } from '../../agent/journal/testing.ts'
import type { RecordSpec } from '../../agent/journal/testing.ts'
import { FrameCache, ReadGate, RecoveryPoint } from '../../agent/recovery/index.ts'
import { adaptiveZstd, RecordKind } from '../../core/record/index.ts'
import { Random, testSeed } from '../kit/random.ts'

const ROUNDS = process.env.CDP_ALL === undefined ? 4 : 60
const LIMITS = { segmentBytes: 150_000, segmentRecords: 48 }
const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

/** What the disks were at a sequence. */
type Moment = { seq: number; models: Buffer[] }

const shared = (files: FilePool) => ({ files, pages: new PageCache(1 << 18), frames: new FrameCache(1 << 20), gate: new ReadGate(4) })

const expectExact = async (point: RecoveryPoint, { seq, models }: Moment, where: string): Promise<void> => {
  for (const { disk, sizeBytes } of DISKS) {
    const found = Buffer.concat(await point.read(disk, 0, sizeBytes))
    if (!found.equals(models[disk])) throw new Error(`${where}: seq ${seq} disk ${disk} differs from byte ${found.findIndex((byte, at) => byte !== models[disk][at])}`)
  }
}

/** Every moment that the directory still offers is exact, all others are refused. @returns how many were offered */
const checkDirectory = async (directory: string, moments: readonly Moment[], fromSeq: number, where: string): Promise<number> => {
  await using files = new FilePool(16)
  let offered = 0
  for (const moment of moments) {
    const opening = RecoveryPoint.open({ ...shared(files), vmDirectory: directory, seq: moment.seq })
    if (moment.seq < fromSeq) {
      await expect(opening).rejects.toMatchObject({ code: 'NOT_FOUND' })
      continue
    }
    await using point = await opening
    await expectExact(point, moment, where)
    offered++
  }
  return offered
}

const randomRecords = (random: Random, models: Buffer[], seq: number): RecordSpec[] =>
  Array.from({ length: random.int(1, 9) }, (_, n) => {
    const disk = random.int(0, 2)
    const offsetBytes = random.chance(0.6) ? random.int(0, 60) * 512 : random.int(0, 900) * 4096
    const lengthBytes = random.int(1, 17) * 512
    const kind = [RecordKind.write, RecordKind.write, RecordKind.write, RecordKind.sync, RecordKind.zero, RecordKind.discard, RecordKind.syncZero][random.int(0, 7)]
    const hasData = kind === RecordKind.write || kind === RecordKind.sync
    const data = Buffer.alloc(hasData ? lengthBytes : 0, random.int(1, 256))
    for (let at = 0; at < data.length; at += 512) data.writeUInt32LE(seq + n, at)
    if (hasData) data.copy(models[disk], offsetBytes)
    else models[disk].fill(0, offsetBytes, offsetBytes + lengthBytes)
    return hasData ? { kind, disk, offsetBytes, data } : { kind, disk, offsetBytes, lengthBytes }
  })

const newest = (moments: readonly Moment[]): number => moments[moments.length - 1].seq

test('the base moves up again and again, cut off anywhere: what is offered is exact, what is below is refused, what is not needed goes', async () => {
  const seed = testSeed()
  console.log(`seed ${seed}`)
  let cutOff = 0
  let freed = 0
  for (let round = 0; round < ROUNDS; round++) {
    const random = new Random(seed + round)
    await using directory = await temporaryDirectory()
    await using copies = await temporaryDirectory()
    await using merger = new RunMerger({ fanout: random.int(2, 5) })
    const open = async (): Promise<VmStore> => {
      const store = await openStore(directory.path, sealer, LIMITS)
      await store.resumeEpoch(1)
      return store
    }
    let store = await openReadyStore(directory.path, sealer, LIMITS)
    const models = DISKS.map(({ sizeBytes }) => Buffer.alloc(sizeBytes))
    const compress = random.chance(0.5) ? adaptiveZstd() : undefined
    let moments: Moment[] = []
    let seq = 2
    await using pinnedFiles = new FilePool(16)
    await using pinned = new AsyncDisposableStack()
    const pins: { point: RecoveryPoint; moment: Moment }[] = []
    for (let step = 0; step < 7; step++) {
      store.onSealed = () => merger.notify(directory.path)
      for (let n = random.int(5, 40); n > 0; n--) {
        const records = randomRecords(random, models, seq)
        store.accept(buildFrame({ firstSeq: seq, records, compress }))
        seq += records.length
        if (random.chance(0.15)) moments.push({ seq: seq - 1, models: models.map((model) => Buffer.from(model)) })
      }
      await store.flush()
      moments.push({ seq: seq - 1, models: models.map((model) => Buffer.from(model)) })
      if (random.chance(0.5)) await store.sealingIdle()
      const lowestPin = Math.min(...pins.map(({ moment }) => moment.seq))
      const target = moments[random.int(0, moments.length)]
      if (target.seq > lowestPin) continue
      if (random.chance(0.3)) {
        const moment = moments[random.int(moments.indexOf(target), moments.length)]
        pins.push({ moment, point: pinned.use(await RecoveryPoint.open({ ...shared(pinnedFiles), vmDirectory: directory.path, seq: moment.seq })) })
      }
      const before = store.baseSeq
      await store.base.check(target.seq)
      const cut = random.chance(0.5) && target.seq > before
      const abort = new AbortController()
      const promoting = store.base.promote(target.seq, {
        signal: abort.signal,
        batchBytes: random.int(1, 200_000),
        pace: async () => {
          if (!random.chance(0.3)) return
          // A crash at this moment leaves what the copy has.
          const copy = `${copies.path}/${step}`
          await rm(copy, { recursive: true, force: true })
          await cp(directory.path, copy, { recursive: true })
          await checkDirectory(directory.path, moments.slice(-4), target.seq, `round ${round} step ${step} under way`)
          await using reopened = await openStore(copy, sealer, LIMITS)
          expect({ base: reopened.baseSeq, to: reopened.base.promotingToSeq }).toEqual({ base: before, to: target.seq })
          await checkDirectory(copy, moments, target.seq, `round ${round} step ${step} crashed`)
          await reopened.base.promote(target.seq)
          await reopened.base.trim()
          await checkDirectory(copy, moments, target.seq, `round ${round} step ${step} redone`)
          expect((await reopened.verify()).damage).toEqual([])
          if (cut) abort.abort()
        },
      })
      const outcome = await promoting.then(() => undefined, (error: unknown) => error)
      if (outcome !== undefined) {
        expect(outcome).toMatchObject({ code: 'ABORTED' })
        cutOff++
        if (random.chance(0.5)) {
          await store[Symbol.asyncDispose]()
          store = await open()
        }
        await checkDirectory(directory.path, moments, target.seq, `round ${round} step ${step} cut off`)
        if (newest(moments) > target.seq) await expect(store.base.promote(target.seq - 1)).rejects.toMatchObject({ code: 'CONFLICT' })
        await store.base.promote(target.seq)
      }
      expect(store.base.promotingToSeq).toBeUndefined()
      freed += await store.base.trim()
      if (random.chance(0.5)) {
        // A segment is sealed beside us at any time, and only a sealed one goes: what must be gone is known when that has ended.
        await store.sealingIdle()
        freed += await store.base.trim()
        const [first] = store.segments
        if (first.sealed) expect(first.lastSeq).toBeGreaterThan(store.baseSeq)
        else expect(store.segments).toHaveLength(1)
      }
      moments = moments.filter((moment) => moment.seq >= store.baseSeq)
      for (const { point, moment } of pins) await expectExact(point, moment, `round ${round} step ${step} pinned`)
      if (random.chance(0.3)) {
        await store[Symbol.asyncDispose]()
        store = await open()
      }
      expect(await checkDirectory(directory.path, moments, store.baseSeq, `round ${round} step ${step}`)).toBe(moments.length)
      expect(store.damage()).toEqual([])
      expect((await store.verify()).damage).toEqual([])
    }
    await merger.idle()
    for (const { point, moment } of pins) await expectExact(point, moment, `round ${round} at the end`)
    await checkDirectory(directory.path, moments, store.baseSeq, `round ${round} at the end`)
    await store[Symbol.asyncDispose]()
  }
  expect(cutOff).toBeGreaterThan(0)
  expect(freed).toBeGreaterThan(0)
}, 300_000)
