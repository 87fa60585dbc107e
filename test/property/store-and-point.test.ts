import { expect, test } from '@jest/globals'
import { FilePool, PageCache, RunMerger } from '../../agent/index/index.ts'
import { SegmentSealer } from '../../agent/journal/index.ts'
import { DISKS, buildFrame, openReadyStore, temporaryDirectory } from '../../agent/journal/testing.ts'
import { FrameCache, ReadGate, RecoveryPoint } from '../../agent/recovery/index.ts'
import { RecordKind } from '../../core/record/index.ts'
import { Random, testSeed } from '../kit/random.ts'

test('points on a store that goes on taking frames, sealing and merging are what was written up to them', async () => {
  const seed = testSeed()
  console.log(`seed ${seed}`)
  const random = new Random(seed)
  await using directory = await temporaryDirectory()
  await using sealer = new SegmentSealer()
  await using merger = new RunMerger({ fanout: 3 })
  await using store = await openReadyStore(directory.path, sealer, { segmentBytes: 300_000, segmentRecords: 64 })
  store.onSealed = () => merger.notify(directory.path)
  await using files = new FilePool()
  await using points = new AsyncDisposableStack()
  const shared = { files, pages: new PageCache(1 << 20), frames: new FrameCache(1 << 22), gate: new ReadGate(4) }
  const models = DISKS.map(({ sizeBytes }) => Buffer.alloc(sizeBytes))
  const checks: (() => Promise<void>)[] = []
  let seq = 2
  for (let round = 0; round < 8; round++) {
    for (let frame = 0; frame < 25; frame++) {
      const records = Array.from({ length: random.int(1, 8) }, () => {
        const disk = random.int(0, 2)
        const offsetBytes = random.int(0, 500) * 4096
        const lengthBytes = random.int(1, 9) * 512
        const fill = random.int(0, 256)
        models[disk].fill(fill, offsetBytes, offsetBytes + lengthBytes)
        return { kind: fill === 0 ? RecordKind.discard : RecordKind.write, disk, offsetBytes, lengthBytes, fill }
      })
      store.accept(buildFrame({ firstSeq: seq, records }))
      seq += records.length
    }
    await store.flush()
    const wanted = models.map((model) => Buffer.from(model))
    const point = points.use(await RecoveryPoint.open({ ...shared, vmDirectory: directory.path, seq: seq - 1 }))
    checks.push(async () => {
      for (const { disk, sizeBytes } of DISKS) expect(Buffer.concat(await point.read(disk, 0, sizeBytes)).equals(wanted[disk])).toBe(true)
    })
    for (const check of checks) await check()
  }
  await store.sealingIdle()
  merger.notify(directory.path)
  await merger.idle()
  expect(store.segments.filter(({ sealed }) => sealed !== undefined).length).toBeGreaterThan(6)
  for (const check of checks) await check()
  await using fresh = await RecoveryPoint.open({ ...shared, vmDirectory: directory.path, seq: seq - 1 })
  for (const { disk, sizeBytes } of DISKS) expect(Buffer.concat(await fresh.read(disk, 0, sizeBytes)).equals(models[disk])).toBe(true)
  expect(shared.pages.sizeBytes).toBeGreaterThan(0)
}, 60_000)
