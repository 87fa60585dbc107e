import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { RecordKind, FrameBuilder, parseFrame } from '../../core/record/index.ts'
import { planCover } from './cover.ts'
import { NO_DATA, keyOf } from './extent.ts'
import { ExtentCursor } from './extent-source.ts'
import { FilePool } from './file-pool.ts'
import { buildLeafRun } from './leaf-run.ts'
import { ListInput } from './merge-input.ts'
import { mergeRuns } from './merge-runs.ts'
import { newestWins } from './newest-wins.ts'
import { PageCache } from './page-cache.ts'
import { RecordList } from './record-list.ts'
import { INNER_CAPACITY, LEAF_CAPACITY, PAGE_BYTES } from './run-layout.ts'
import { RunReader } from './run-reader.ts'
import { RunWriter } from './run-writer.ts'

const seed = Number(process.env.CDP_SEED ?? (Date.now() & 0x7fff_ffff))
console.log(`seed ${seed}`)
let state = seed | 1
const below = (limit: number): number => {
  state = Math.imul(state ^ (state >>> 15), 0x2c1b_3c6d) + 0x6d2b_79f5
  return ((state ^ (state >>> 13)) >>> 0) % limit
}

const directory = mkdtempSync('/tmp/cdp-run-')
afterAll(() => rmSync(directory, { recursive: true }))

type Entry = { key: number; length: number; segment: number; frame: number; sector: number }

const writeRun = (entries: Entry[], name: string): { path: string; runBytes: number } => {
  const pages: Buffer[] = []
  const writer = new RunWriter((page) => pages.push(Buffer.from(page)))
  for (const { key, length, segment, frame, sector } of entries) writer.add(key, length, segment, frame, sector)
  const { runBytes } = writer.finish({ firstSegment: 0, lastSegment: 9, lastSeq: 1 })
  const path = join(directory, name)
  writeFileSync(path, Buffer.concat(pages))
  expect(runBytes).toBe(pages.length * PAGE_BYTES)
  return { path, runBytes }
}

const readAll = async (reader: RunReader, from = 0): Promise<Entry[]> => {
  const cursor = new ExtentCursor()
  const found: Entry[] = []
  while (!reader.seek(cursor, from)) await reader.load(cursor)
  while (cursor.startKey !== Infinity) {
    found.push({ key: cursor.startKey, length: cursor.endKey - cursor.startKey, segment: cursor.segment, frame: cursor.frame, sector: cursor.sector })
    const next = cursor.endKey
    if (!reader.next(cursor)) while (!reader.seek(cursor, next)) await reader.load(cursor)
  }
  return found
}

test.each([0, 1, LEAF_CAPACITY, LEAF_CAPACITY + 1, 5 * LEAF_CAPACITY, LEAF_CAPACITY * INNER_CAPACITY + 1])('a run of %i entries gives back every one, in order and by key', async (count) => {
  await using files = new FilePool()
  const entries: Entry[] = []
  for (let at = 0, key = 7; at < count; at++) {
    entries.push({ key, length: 1 + below(9), segment: below(70_000), frame: below(2 ** 32), sector: below(8192) })
    key += 10 + below(at % 1000 === 999 ? 2 ** 34 : 50)
  }
  const place = writeRun(entries, `run-${count}`)
  const reader = await RunReader.open({ ...place, offsetBytes: 0 }, files, new PageCache(PAGE_BYTES))
  expect(reader.header.entryCount).toBe(count)
  expect(await readAll(reader)).toEqual(entries)
  const cursor = new ExtentCursor()
  for (let n = 0; n < Math.min(300, count); n++) {
    const at = below(count)
    const key = entries[at].key + below(entries[at].length + 5)
    while (!reader.seek(cursor, key)) await reader.load(cursor)
    const wanted = entries.slice(at, at + 4).find((entry) => entry.key + entry.length > key)
    expect(cursor.startKey).toBe(wanted?.key ?? Infinity)
  }
})

test('a range longer than an entry can be is several entries, and neighbours are joined', async () => {
  await using files = new FilePool()
  const place = writeRun([
    { key: keyOf(0, 0), length: 200_000, segment: 1, frame: 5, sector: NO_DATA },
    { key: keyOf(1, 0), length: 8, segment: 1, frame: 5, sector: 0 },
    { key: keyOf(1, 8), length: 8, segment: 1, frame: 5, sector: 8 },
    { key: keyOf(1, 16), length: 8, segment: 1, frame: 6, sector: 16 },
  ], 'long')
  const reader = await RunReader.open({ ...place, offsetBytes: 0 }, files, new PageCache(1 << 20))
  const found = await readAll(reader)
  expect(found.map(({ length }) => length)).toEqual([65_535, 65_535, 65_535, 3395, 16, 8])
  expect(found[0]).toMatchObject({ frame: 0, sector: NO_DATA })
})

test('newest wins and merging agree with an array that is painted in order', () => {
  for (let round = 0; round < 30; round++) {
    const segments = 1 + below(6)
    const model = new Map<number, string>()
    const lists = []
    for (let segment = 0; segment < segments; segment++) {
      const count = 1 + below(60)
      const keys = new Float64Array(count)
      const lengths = new Uint32Array(count)
      const frames = new Uint32Array(count)
      const sectors = new Uint16Array(count)
      for (let at = 0; at < count; at++) {
        keys[at] = keyOf(below(2), below(100))
        lengths[at] = 1 + below(30)
        frames[at] = 1 + below(1000)
        sectors[at] = below(4) === 0 ? NO_DATA : below(100)
        for (let sector = 0; sector < lengths[at]; sector++) {
          model.set(keys[at] + sector, sectors[at] === NO_DATA ? `${segment} zero` : `${segment} ${frames[at]} ${sectors[at] + sector}`)
        }
      }
      lists.unshift(newestWins({ segment, keys, lengths, frames, sectors }, count))
    }
    const merged = new Map<number, string>()
    const writer = { add: (key: number, length: number, segment: number, frame: number, sector: number): void => {
      for (let at = 0; at < length; at++) {
        if (merged.has(key + at)) throw new Error('extents overlap')
        merged.set(key + at, sector === NO_DATA ? `${segment} zero` : `${segment} ${frame} ${sector + at}`)
      }
    } }
    mergeRuns(lists.map((list) => new ListInput(list)), writer as unknown as RunWriter)
    expect(new Map([...merged].sort(([a], [b]) => a - b))).toEqual(new Map([...model].sort(([a], [b]) => a - b)))
  }
})

test('262,144 random records become a leaf run of less than 15 bytes each in well below half a second', () => {
  const records = new RecordList(0, 1)
  const frame = new FrameBuilder(Buffer.alloc(512), 16_384)
  for (let seq = 1, n = 0; n < 16; n++, seq += 16_384) {
    frame.reset()
    for (let at = 0; at < 16_384; at++) frame.addRange(RecordKind.zero, at & 1, below(2 ** 28) * 4096, 4096)
    const { head, payload } = frame.seal({ firstSeq: seq, epoch: 1, atUnixMs: 1, flags: 0 })
    records.addFrame(parseFrame(Buffer.concat([head, payload])).table, seq, 128 + n * 400_000)
  }
  const started = performance.now()
  const run = buildLeafRun(records)
  const elapsedMs = performance.now() - started
  console.log(`leaf run of 262,144 records: ${elapsedMs.toFixed(0)} ms, ${(run.length / 262_144).toFixed(2)} bytes each`)
  expect(run.length / 262_144).toBeLessThan(15)
  expect(records.countUpTo(1000)).toBe(1000)
  expect(records.extents(0).count).toBe(0)
  expect(elapsedMs).toBeLessThan(2000)
})

test('a flipped bit anywhere in a run is found when its page is read', async () => {
  await using files = new FilePool()
  const entries = Array.from({ length: 2 * LEAF_CAPACITY }, (_, at) => ({ key: at * 10, length: 3, segment: 0, frame: at, sector: 0 }))
  const { path, runBytes } = writeRun(entries, 'flipped')
  const { readFileSync } = await import('node:fs')
  const good = readFileSync(path)
  for (let round = 0; round < 60; round++) {
    const bad = Buffer.from(good)
    bad[below(runBytes)] ^= 1 << below(8)
    writeFileSync(path, bad)
    await files.forget(path)
    await expect((async () => readAll(await RunReader.open({ path, offsetBytes: 0, runBytes }, files, new PageCache(1 << 20))))()).rejects.toMatchObject({ code: 'CHECKSUM' })
  }
})

test('a cover takes the highest runs that end where it needs them, and leaf runs elsewhere', () => {
  const run = (level: number, firstSegment: number, lastSegment: number) => ({ level, firstSegment, lastSegment, path: '' })
  const runs = [run(1, 0, 3), run(1, 4, 7), run(1, 8, 11), run(1, 16, 19), run(2, 0, 15)]
  const cover = (first: number, last: number): string => planCover(first, last, runs).map((part) => `${part.run?.level ?? 'leaf'}:${part.firstSegment}-${part.lastSegment}`).join(' ')
  expect(cover(0, 17)).toBe('leaf:17-17 leaf:16-16 2:0-15')
  expect(cover(0, 14)).toBe('leaf:14-14 leaf:13-13 leaf:12-12 1:8-11 1:4-7 1:0-3')
  expect(cover(6, 8)).toBe('leaf:8-8 1:4-7')
  expect(cover(5, 4)).toBe('')
})
