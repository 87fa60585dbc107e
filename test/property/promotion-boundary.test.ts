import { mkdtemp, readdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from '@jest/globals'
import { FilePool, IndexView, listSegments, mergeVm, PageCache, removeRunsBelow } from '../../agent/index/index.ts'
import { FrameCache, ReadGate, RecoveryPoint } from '../../agent/recovery/index.ts'
import { Random, testSeed } from '../kit/random.ts'
import { RandomHistory } from '../kit/random-history.ts'

const within = async (work: (directory: string) => Promise<void>): Promise<void> => {
  const directory = await mkdtemp('/tmp/cdp-pb-')
  try {
    await work(directory)
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
}

const shared = (files: FilePool) => ({ files, pages: new PageCache(1 << 16), frames: new FrameCache(1 << 20), gate: new ReadGate(4) })

const expectModel = async (point: RecoveryPoint, history: RandomHistory, where: string): Promise<void> => {
  for (const { disk, sizeBytes } of history.disks) {
    const found = Buffer.concat(await point.read(disk, 0, sizeBytes))
    const model = history.modelAt(point.seq, disk)
    if (!found.equals(model)) throw new Error(`${where}: seq ${point.seq} disk ${disk} differs from byte ${found.findIndex((byte, at) => byte !== model[at])}`)
  }
}

test('runs outlive the oldest of their segments: at every boundary, old and new views give the same bytes', async () => {
  const seed = testSeed()
  console.log(`seed ${seed}`)
  for (let round = 0; round < (process.env.CDP_ALL === undefined ? 3 : 40); round++) {
    const random = new Random(seed + round)
    await within(async (directory) => {
      const fanout = random.int(2, 4)
      using history = new RandomHistory(directory, random, { diskBytes: 128 * 1024 })
      while (history.writer.segmentCount < fanout ** 2 * 2 + 1) history.grow(random.int(20, 60))
      history.writer.sealAll()
      await mergeVm(directory, fanout)
      history.grow(30)
      const runsBefore = (await readdir(join(directory, 'runs'))).length
      expect(runsBefore).toBeGreaterThan(fanout)
      await using files = new FilePool(4)
      await using kept = new AsyncDisposableStack()
      const old: RecoveryPoint[] = []
      for (let n = 0; n < 3; n++) old.push(kept.use(await RecoveryPoint.open({ ...shared(files), vmDirectory: directory, seq: history.writer.lastSeq - random.int(0, 20) })))
      const { firstSeqs } = await listSegments(directory, files)
      for (let gone = 1; gone < firstSeqs.length; gone++) {
        // The base is the last record of a segment, or somewhere in the one behind it.
        const base = Math.min(firstSeqs[gone] - 1 + (random.chance(0.5) ? 0 : random.int(0, 8)), old[0].seq, old[1].seq, old[2].seq)
        if (base < firstSeqs[gone] - 1) break
        history.promote(base)
        const path = join(directory, 'journal', (await readdir(join(directory, 'journal'))).sort()[0])
        await rm(path)
        await files.forget(path)
        if (random.chance(0.7)) await removeRunsBelow(directory, gone)
        await using fresh = new FilePool(4)
        const damaged: unknown[] = []
        for (const seq of [base, base + random.int(0, history.writer.lastSeq - base + 1), history.writer.lastSeq]) {
          await using point = await RecoveryPoint.open({ ...shared(fresh), vmDirectory: directory, seq, onIndexDamage: (damage) => damaged.push(damage) })
          await expectModel(point, history, `round ${round}, ${gone} gone, base ${base}, new`)
        }
        await using view = await viewOf(directory, base, fresh)
        expect(view.floorSegment).toBe(gone)
        for (const point of old) await expectModel(point, history, `round ${round}, ${gone} gone, base ${base}, old`)
        expect(damaged).toEqual([])
      }
      await removeRunsBelow(directory, firstSeqs.length - 1)
      const runs = await readdir(join(directory, 'runs'))
      expect(runs.every((name) => Number(name.split(/[-.]/)[2]) >= firstSeqs.length - 1)).toBe(true)
      expect(runs.length).toBeLessThan(runsBefore)
      // Merging goes on above what is gone, and never touches it.
      while (history.writer.segmentCount < fanout ** 2 * 4) history.grow(60)
      history.writer.sealAll()
      await mergeVm(directory, fanout)
      await using files2 = new FilePool(4)
      await using point = await RecoveryPoint.open({ ...shared(files2), vmDirectory: directory, seq: history.writer.lastSeq })
      await expectModel(point, history, `round ${round}, merged on`)
    })
  }
}, 300_000)

const viewOf = async (vmDirectory: string, seq: number, files: FilePool): Promise<AsyncDisposable & { floorSegment: number }> => {
  const view = await IndexView.open({ vmDirectory, seq, files, cache: new PageCache(1 << 16) })
  return { floorSegment: view.floorSegment, [Symbol.asyncDispose]: async () => undefined }
}

test('points open, read and merge while the oldest segments go, one after the other', async () => {
  const seed = testSeed()
  console.log(`seed ${seed}`)
  const random = new Random(seed)
  await within(async (directory) => {
    using history = new RandomHistory(directory, random, { diskBytes: 128 * 1024 })
    while (history.writer.segmentCount < 120) history.grow(60)
    history.writer.sealAll()
    await mergeVm(directory, 3)
    const base = history.writer.lastSeq
    history.promote(base)
    const names = (await readdir(join(directory, 'journal'))).sort()
    let opened = 0
    let removing = true
    const remove = async (): Promise<void> => {
      for (const [at, name] of names.slice(0, -1).entries()) {
        await rm(join(directory, 'journal', name))
        if (at % 10 === 9) await removeRunsBelow(directory, at + 1)
      }
      removing = false
    }
    const removed = remove()
    while (removing) {
      await using files = new FilePool(8)
      await using point = await RecoveryPoint.open({ ...shared(files), vmDirectory: directory, seq: base })
      await expectModel(point, history, 'while segments go')
      await mergeVm(directory, 3)
      opened++
    }
    await removed
    expect(opened).toBeGreaterThan(0)
    await using files = new FilePool(8)
    expect((await listSegments(directory, files)).count).toBe(1)
    await using point = await RecoveryPoint.open({ ...shared(files), vmDirectory: directory, seq: base })
    await expectModel(point, history, 'after they are gone')
  })
}, 60_000)
