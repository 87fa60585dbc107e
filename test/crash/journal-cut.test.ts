import { readdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { SegmentSealer } from '../../agent/journal/index.ts'
import type { VmStore } from '../../agent/journal/index.ts'
import { buildFrame, memoryDirectory, openReadyStore, openStore } from '../../agent/journal/testing.ts'
import { RecordKind } from '../../core/record/index.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

const FRAMES = [2, 3, 5].map((firstSeq) =>
  buildFrame({ firstSeq, records: Array.from({ length: firstSeq === 3 ? 2 : 1 }, (_, at) => ({ kind: RecordKind.write, offsetBytes: firstSeq * 4096 + at * 512, lengthBytes: 512, fill: firstSeq + at })) }),
)

const framesOf = async (store: VmStore): Promise<number[]> => {
  const found: number[] = []
  for (const { segmentNumber } of store.segments) {
    for await (const { header, frameOffset } of store.recordsOf(segmentNumber)) {
      const { payload } = await store.readFrame(segmentNumber, frameOffset)
      const original = FRAMES.find((frame) => frame.readUInt32LE(8) === header.firstSeq)
      expect(payload.equals(original?.subarray(64 + header.recordCount * 24) ?? Buffer.alloc(0))).toBe(true)
      found.push(header.firstSeq)
    }
  }
  return found
}

/** A journal of three commits: its last file, and after each commit where it ended and what the hint said. */
const record = async (directory: string): Promise<{ path: string; bytes: Buffer; commits: { endBytes: number; lastSeq: number; hint: Buffer }[] }> => {
  const commits = []
  const store = await openReadyStore(directory, sealer)
  for (const frame of FRAMES) {
    store.accept(frame)
    await store.flush()
    commits.push({ endBytes: store.segments[0].framesEndBytes, lastSeq: store.durableSeq, hint: await readFile(join(directory, 'durable.hint')) })
  }
  const { path } = store.segments[0]
  await store[Symbol.asyncDispose]()
  return { path, bytes: await readFile(path), commits }
}

test('a journal cut at any byte opens with a whole prefix, and the torn end is reported', async () => {
  await using directory = await memoryDirectory()
  const { path, bytes, commits } = await record(directory.path)
  const hintPath = join(directory.path, 'durable.hint')
  for (const withHint of [true, false]) {
    for (let cut = 0; cut <= bytes.length; cut++) {
      const whole = commits.filter((commit) => commit.endBytes <= cut)
      const last = whole.at(-1)
      await writeFile(path, bytes.subarray(0, cut))
      await writeFile(hintPath, withHint && last !== undefined ? last.hint : Buffer.alloc(0))
      await using store = await openStore(directory.path, sealer)
      const lastSeq = last?.lastSeq ?? 1
      const onBoundary = cut === 128 || last?.endBytes === cut
      expect({ cut, durableSeq: store.durableSeq, damage: store.damage() }).toEqual({ cut, durableSeq: lastSeq, damage: [] })
      expect(store.openReport.tornTail?.firstSeq).toBe(onBoundary ? undefined : lastSeq + 1)
      expect(await framesOf(store)).toEqual([2, 3, 5].slice(0, whole.length))
      if (cut % 97 === 0) {
        await store.resumeEpoch(1)
        for (const frame of FRAMES) store.accept(Buffer.from(frame))
        await store.flush()
        expect(await framesOf(store)).toEqual([2, 3, 5])
      }
    }
  }
}, 120_000)

test('a file shorter than what was acknowledged is damage, not a torn tail: the sequences are named and not given again', async () => {
  await using directory = await memoryDirectory()
  const { path, bytes } = await record(directory.path)
  for (let cut = 0; cut < bytes.length; cut += 13) {
    await writeFile(path, bytes.subarray(0, cut))
    await using store = await openStore(directory.path, sealer)
    expect({ cut, durableSeq: store.durableSeq }).toEqual({ cut, durableSeq: 5 })
    expect(store.damage().some((one) => one.lastSeq === 5)).toBe(true)
  }
  await using store = await openStore(directory.path, sealer)
  await store.resumeEpoch(1)
  store.accept(buildFrame({ firstSeq: 6, records: [{ kind: RecordKind.zero }] }))
  await store.flush()
  expect(await readdir(join(directory.path, 'journal'))).toContain('0000000000000006.seg')
  expect(store.durableSeq).toBe(6)
}, 60_000)

test('a hole above the last promise with whole frames behind it is cut: a power failure may leave that', async () => {
  await using directory = await memoryDirectory()
  const { path, bytes, commits } = await record(directory.path)
  const holed = Buffer.from(bytes).fill(0, commits[0].endBytes, commits[1].endBytes)
  await writeFile(path, holed)
  await writeFile(join(directory.path, 'durable.hint'), commits[0].hint)
  await using store = await openStore(directory.path, sealer)
  expect({ durableSeq: store.durableSeq, damage: store.damage() }).toEqual({ durableSeq: 2, damage: [] })
  expect(store.openReport.tornTail).toEqual({ segment: 0, firstSeq: 3, lastSeq: undefined, cutBytes: bytes.length - commits[0].endBytes })
  expect(await framesOf(store)).toEqual([2])
})

test('a frame inside the data of a damaged frame is never taken for one of the journal', async () => {
  await using directory = await memoryDirectory()
  const write = (firstSeq: number, data: Buffer): Buffer => buildFrame({ firstSeq, records: [{ kind: RecordKind.write, offsetBytes: 0, data }] })
  const decoy = Buffer.alloc(8192)
  // What a guest may have on its disk: whole frames with the very sequences that are expected next.
  for (const [at, firstSeq] of [[0, 4], [1000, 5], [2000, 3], [3000, 4], [4000, 5]]) write(firstSeq, Buffer.alloc(512, 0xdd)).copy(decoy, at)
  const frames = [write(2, Buffer.alloc(512, 2)), write(3, decoy), write(4, Buffer.alloc(512, 4)), write(5, Buffer.alloc(512, 5))]
  const first = await openReadyStore(directory.path, sealer)
  for (const frame of frames) first.accept(Buffer.from(frame))
  await first.flush()
  const { path } = first.segments[0]
  await first[Symbol.asyncDispose]()
  const bytes = await readFile(path)
  bytes[128 + frames[0].length + 10] ^= 4
  await writeFile(path, bytes)
  await using store = await openStore(directory.path, sealer)
  expect(store.damage()).toMatchObject([{ firstSeq: 3, lastSeq: 3 }])
  const offset = 128 + frames[0].length + frames[1].length
  expect((await store.readFrame(0, offset)).payload.equals(Buffer.alloc(512, 4))).toBe(true)
  const seen: number[] = []
  await expect(async () => {
    for await (const { header } of store.recordsOf(0)) seen.push(header.firstSeq)
  }).rejects.toMatchObject({ code: 'JOURNAL_DAMAGED', context: { firstSeq: 3, lastSeq: 3 } })
  expect(seen).toEqual([2])
  for await (const { header, table } of store.recordsOf(0, { fromSeq: 4 })) seen.push(header.firstSeq, table.lengthBytes(0))
  expect(seen).toEqual([2, 4, 512, 5, 512])
})
