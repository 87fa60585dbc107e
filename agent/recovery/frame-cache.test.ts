import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { FrameBuilder, RecordKind } from '../../core/record/index.ts'
import { FilePool } from '../index/index.ts'
import { FrameCache } from './frame-cache.ts'

const directory = mkdtempSync('/tmp/cdp-fc-')
afterAll(() => rmSync(directory, { recursive: true }))

const path = join(directory, 'a.seg')
const builder = new FrameBuilder(Buffer.alloc(1 << 20))
for (let n = 0; n < 64; n++) {
  const at = builder.reserveData(RecordKind.write, 0, n * 4096, 4096)
  builder.payload.fill(n + 1, at, at + 4096)
}
const sealed = builder.seal({ firstSeq: 1, epoch: 1, atUnixMs: 1, flags: 0 })
const bytes = Buffer.concat([Buffer.alloc(128), sealed.head, sealed.payload])
const place = { path, segment: 0, frameOffset: 128, firstSeq: 1, lastSeq: 64 }

test('parts of a frame that was checked are read by themselves, and checked again', async () => {
  writeFileSync(path, bytes)
  await using files = new FilePool()
  // One byte of budget: nothing but the sums is kept.
  const cache = new FrameCache(1)
  expect(await cache.loadPart(5, place, files, 512, 1024)).toEqual(Buffer.alloc(1024, 1))
  for (let n = 0; n < 64; n++) expect((await cache.loadPart(5, place, files, n * 4096 + 1024, 3072)).equals(Buffer.alloc(3072, n + 1))).toBe(true)
  expect((await cache.loadPart(5, place, files, 8192 - 512, 1024)).subarray(510, 514)).toEqual(Buffer.from([2, 2, 3, 3]))
  expect([cache.loads, cache.parts]).toEqual([1, 65])
  const bad = Buffer.from(bytes)
  bad[bad.length - 1] ^= 1
  writeFileSync(path, bad)
  await files.forget(path)
  await expect(cache.loadPart(5, place, files, 63 * 4096, 512)).rejects.toMatchObject({ code: 'JOURNAL_DAMAGED' })
  expect((await cache.loadPart(5, place, files, 62 * 4096, 512)).equals(Buffer.alloc(512, 63))).toBe(true)
})

test('the cache stays within its budget and several readers share one load', async () => {
  writeFileSync(path, Buffer.concat([bytes, bytes.subarray(128)]))
  await using files = new FilePool()
  const cache = new FrameCache(400 * 1024)
  const loaded = await Promise.all([1, 2, 3].map(() => cache.load(128, place, files)))
  expect(cache.loads).toBe(1)
  expect(loaded[0]).toBe(loaded[2])
  await cache.load(9, { ...place, frameOffset: bytes.length }, files)
  expect(cache.sizeBytes).toBeLessThanOrEqual(400 * 1024)
  expect(cache.get(128)).toBeUndefined()
  expect(cache.get(9)?.length).toBe(64 * 4096)
})

test('a frame in the wrong place is damage, a file that is gone is not', async () => {
  writeFileSync(path, bytes)
  await using files = new FilePool()
  const cache = new FrameCache(1 << 20)
  await expect(cache.load(1, { ...place, firstSeq: 2 }, files)).rejects.toMatchObject({ code: 'JOURNAL_DAMAGED' })
  await expect(cache.load(1, { ...place, frameOffset: 129 }, files)).rejects.toMatchObject({ code: 'JOURNAL_DAMAGED' })
  await expect(cache.load(1, { ...place, path: `${path}.gone` }, files)).rejects.toMatchObject({ code: 'ENOENT' })
})
