import { closeSync, openSync, readFileSync, readdirSync, rmSync, statSync, writeSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from '@jest/globals'
import { FilePool, PageCache, RunMerger, mergeVm, parseSegmentTrailer } from '../../agent/index/index.ts'
import type { IndexDamage } from '../../agent/index/index.ts'
import { FrameCache, ReadGate, RecoveryPoint } from '../../agent/recovery/index.ts'
import { errorCode } from '../../core/errors/index.ts'
import type { CdpError } from '../../core/errors/index.ts'
import { Random, testSeed } from '../kit/random.ts'
import { RandomHistory } from '../kit/random-history.ts'

let directory: string
let random: Random
let history: RandomHistory
let files: FilePool
let indexDamage: IndexDamage[]
let journalDamage: CdpError[]

beforeEach(async () => {
  const seed = testSeed()
  console.log(`seed ${seed}`)
  random = new Random(seed)
  directory = await mkdtemp('/tmp/cdp-life-')
  history = new RandomHistory(directory, random)
  files = new FilePool(4)
  indexDamage = []
  journalDamage = []
})

afterEach(async () => {
  history[Symbol.dispose]()
  await files[Symbol.asyncDispose]()
  await rm(directory, { recursive: true, force: true })
})

const openPoint = (seq: number): Promise<RecoveryPoint> =>
  RecoveryPoint.open({
    vmDirectory: directory, seq, files, pages: new PageCache(4096), frames: new FrameCache(1), gate: new ReadGate(2),
    onIndexDamage: (damage) => indexDamage.push(damage), onJournalDamage: (error) => journalDamage.push(error),
  })

const isWhole = async (point: RecoveryPoint): Promise<boolean> => {
  for (const { disk, sizeBytes } of history.disks) {
    if (!Buffer.concat(await point.read(disk, 0, sizeBytes)).equals(history.modelAt(point.seq, disk))) return false
  }
  return true
}

const flip = (path: string, offsetBytes: number): void => {
  const byte = Buffer.from([readFileSync(path)[offsetBytes] ^ 0x10])
  const fd = openSync(path, 'r+')
  writeSync(fd, byte, 0, 1, offsetBytes)
  closeSync(fd)
}

const segmentPaths = (): string[] => readdirSync(join(directory, 'journal')).sort().map((name) => join(directory, 'journal', name))
const runPaths = (): string[] => readdirSync(join(directory, 'runs')).map((name) => join(directory, 'runs', name))

test('a point stays what it is while the journal grows, is sealed and merged', async () => {
  history.grow(100)
  await using point = await openPoint(history.writer.lastSeq - 3)
  expect(await isWhole(point)).toBe(true)
  for (let step = 0; step < 3; step++) {
    history.grow(100)
    history.writer.sealAll()
    await mergeVm(directory, 2)
    expect(await isWhole(point)).toBe(true)
  }
  await using again = await openPoint(point.seq)
  expect(await isWhole(again)).toBe(true)
})

test('a point stays what it is while the base moves up to it and segments are taken away', async () => {
  history.grow(400)
  history.writer.sealAll()
  await mergeVm(directory, 3)
  const seq = history.writer.lastSeq - 10
  await using open = await openPoint(seq)
  await using untouched = await openPoint(seq)
  expect(await isWhole(open)).toBe(true)
  await open.blockStatus(0, 0, 4096)
  history.promote(seq - 5)
  for (const path of segmentPaths().slice(0, -3)) rmSync(path)
  expect(await isWhole(open)).toBe(true)
  expect(await isWhole(untouched)).toBe(true)
  for (const point of [open, untouched]) {
    for (const { disk, sizeBytes } of history.disks) {
      const model = history.modelAt(seq, disk)
      let at = 0
      for (const extent of await point.blockStatus(disk, 0, sizeBytes)) {
        if (extent.isHole) expect(model.subarray(at, at + extent.lengthBytes).every((byte) => byte === 0)).toBe(true)
        at += extent.lengthBytes
      }
    }
  }
  await using later = await openPoint(seq)
  expect(await isWhole(later)).toBe(true)
  await expect(openPoint(seq - 6)).rejects.toMatchObject({ code: 'NOT_FOUND' })
})

test('every page of every run may be damaged: it is reported, bypassed, and a merged run is made again', async () => {
  history.grow(300)
  history.writer.sealAll()
  await mergeVm(directory, 3)
  const { lastSeq } = history.writer
  expect(runPaths().length).toBeGreaterThan(0)
  for (const path of runPaths()) flip(path, random.int(0, statSync(path).size))
  for (const path of segmentPaths()) {
    const bytes = readFileSync(path)
    if (bytes.readUInt32LE(bytes.length - 128) !== 0x45504443) continue
    const { runOffsetBytes, runBytes } = parseSegmentTrailer(bytes.subarray(-128))
    flip(path, runOffsetBytes + random.int(0, runBytes))
  }
  {
    await using point = await openPoint(lastSeq)
    expect(await isWhole(point)).toBe(true)
  }
  expect(indexDamage.filter(({ level }) => level > 0).length).toBeGreaterThan(0)
  expect(indexDamage.filter(({ level }) => level === 0).length).toBeGreaterThan(0)
  await using merger = new RunMerger({ fanout: 3 })
  for (const { path } of indexDamage) await merger.rebuild(directory, path)
  await merger.idle()
  indexDamage.length = 0
  await using again = await openPoint(lastSeq)
  expect(await isWhole(again)).toBe(true)
  // Leaf runs are parts of sealed segments and stay damaged; merged runs were made from the frames.
  expect(indexDamage.filter(({ level }) => level > 0)).toEqual([])
})

test('a flipped bit anywhere in a sealed segment never shows as data: reads are right or refused, and the damage is reported', async () => {
  history.grow(120)
  history.writer.sealAll()
  const { lastSeq } = history.writer
  let refused = 0
  for (let round = 0; round < 60; round++) {
    const paths = segmentPaths().slice(0, -1)
    const path = paths[random.int(0, paths.length)]
    const at = random.int(0, statSync(path).size)
    flip(path, at)
    try {
      await using point = await openPoint(lastSeq)
      for (const { disk, sizeBytes } of history.disks) {
        const model = history.modelAt(lastSeq, disk)
        for (let offset = 0; offset + 16_384 <= sizeBytes; offset += 16_384) {
          try {
            const data = Buffer.concat(await point.read(disk, offset, 16_384))
            if (!data.equals(model.subarray(offset, offset + 16_384))) throw new Error(`byte ${at} of ${path}: wrong data at ${offset} of disk ${disk}`)
          } catch (error) {
            if (errorCode(error) !== 'JOURNAL_DAMAGED') throw error
            refused++
          }
        }
      }
    } catch (error) {
      // An index that has to be made from the damaged frame.
      if (errorCode(error) !== 'JOURNAL_DAMAGED') throw error
      refused++
    }
    flip(path, at)
  }
  expect(refused).toBeGreaterThan(0)
  expect(journalDamage.length).toBeGreaterThan(0)
  await using point = await openPoint(lastSeq)
  expect(await isWhole(point)).toBe(true)
})

test('a sequence outside the history is refused with its reason', async () => {
  history.grow(50)
  const { lastSeq } = history.writer
  await expect(openPoint(lastSeq + 1)).rejects.toMatchObject({ code: 'NOT_FOUND' })
  history.writer.closeSegment()
  history.writer.sealAll()
  await expect(openPoint(lastSeq + 1)).rejects.toMatchObject({ code: 'NOT_FOUND' })
  await using last = await openPoint(lastSeq)
  expect(await isWhole(last)).toBe(true)
  await expect(last.read(0, history.disks[0].sizeBytes, 512)).rejects.toMatchObject({ code: 'BAD_INPUT' })
  await last[Symbol.asyncDispose]()
  await expect(last.read(0, 0, 512)).rejects.toMatchObject({ code: 'CLOSED' })
})
