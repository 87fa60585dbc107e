import { open, readFile, writeFile } from 'node:fs/promises'
import { afterAll, expect, test } from '@jest/globals'
import { SegmentSealer } from '../../agent/journal/index.ts'
import type { Damage, VmStore } from '../../agent/journal/index.ts'
import { buildFrame, memoryDirectory, openReadyStore, openStore } from '../../agent/journal/testing.ts'
import { verifySegment } from '../../agent/journal/verify-segment.ts'
import { errorCode, toCdpError } from '../../core/errors/index.ts'
import { parseFrame, RecordKind } from '../../core/record/index.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

const FIRST_SEQS = [2, 3, 5, 6]
const FRAMES = FIRST_SEQS.map((firstSeq) =>
  buildFrame({ firstSeq, records: Array.from({ length: firstSeq === 3 ? 2 : 1 }, (_, at) => ({ kind: RecordKind.write, offsetBytes: firstSeq * 4096 + at * 512, lengthBytes: 512, fill: firstSeq + at })) }),
)

const flip = async (path: string, offsetBytes: number): Promise<void> => {
  const handle = await open(path, 'r+')
  const byte = Buffer.alloc(1)
  await handle.read(byte, 0, 1, offsetBytes)
  byte[0] ^= 1 << (offsetBytes & 7)
  await handle.write(byte, 0, 1, offsetBytes)
  await handle.close()
}

/** Reads every frame where it was written; each comes as it was, or is refused by name. Returns the sequences refused. */
const readAll = async (store: VmStore, segmentNumber: number, places: { offsetBytes: number; frame: Buffer }[]): Promise<number[]> => {
  const refused: number[] = []
  for (const { offsetBytes, frame } of places) {
    const original = parseFrame(frame)
    try {
      const { payload, header } = await store.readFrame(segmentNumber, offsetBytes)
      expect(header.firstSeq).toBe(original.header.firstSeq)
      expect(payload.equals(original.stored)).toBe(true)
    } catch (error) {
      expect(errorCode(error)).toBe('JOURNAL_DAMAGED')
      const { firstSeq, lastSeq } = toCdpError(error).context
      expect(Number(firstSeq) <= original.header.firstSeq && original.header.lastSeq <= Number(lastSeq)).toBe(true)
      refused.push(original.header.firstSeq)
    }
  }
  return refused
}

const covers = (damage: readonly Damage[], seq: number): boolean => damage.some((one) => one.firstSeq <= seq && seq <= one.lastSeq)

const place = (frames: Buffer[]): { offsetBytes: number; frame: Buffer }[] => {
  let offsetBytes = 128
  return frames.map((frame) => ({ frame, offsetBytes: (offsetBytes += frame.length) - frame.length }))
}

test('a flipped bit anywhere in the open segment is found at open, named by its sequences, and what was acknowledged stays acknowledged', async () => {
  await using directory = await memoryDirectory()
  const first = await openReadyStore(directory.path, sealer)
  for (const frame of FRAMES) first.accept(Buffer.from(frame))
  await first.flush()
  const { path } = first.segments[0]
  await first[Symbol.asyncDispose]()
  const bytes = await readFile(path)
  const places = place(FRAMES)
  for (let at = 0; at < bytes.length; at++) {
    await writeFile(path, bytes)
    await flip(path, at)
    await using store = await openStore(directory.path, sealer)
    const hit = places.findLast((one) => one.offsetBytes <= at)
    expect({ at, durableSeq: store.durableSeq, found: store.damage().length > 0 }).toEqual({ at, durableSeq: 6, found: true })
    expect(covers(store.damage(), hit === undefined ? 2 : hit.frame.readUInt32LE(8))).toBe(true)
    const refused = await readAll(store, 0, places)
    expect({ at, refused }).toEqual({ at, refused: hit === undefined ? [] : [hit.frame.readUInt32LE(8)] })
  }
}, 120_000)

test('a flipped bit anywhere in a sealed segment is found by the scrub, and by whoever reads the frame', async () => {
  await using directory = await memoryDirectory()
  const first = await openReadyStore(directory.path, sealer, { segmentRecords: 5 })
  for (const frame of FRAMES) first.accept(Buffer.from(frame))
  for (const firstSeq of [7, 8]) first.accept(buildFrame({ firstSeq, records: [{ kind: RecordKind.zero }] }))
  await first.flush()
  await first.sealingIdle()
  const [{ path, framesEndBytes, lastSeq, sealed, fileBytes }] = first.segments
  expect({ sealed, lastSeq }).toEqual({ sealed: true, lastSeq: 6 })
  const places = place(FRAMES)
  const request = { path, firstSeq: 2, lastSeq, framesEndBytes, sealed, previousDigest: undefined }
  expect(await verifySegment(request)).toMatchObject({ frames: 4, records: 5, bad: [] })
  const pageStep = process.env.CDP_ALL === undefined ? 5 : 1
  for (let at = 0; at < fileBytes; at += at >= framesEndBytes && at < fileBytes - 140 ? pageStep : 1) {
    await flip(path, at)
    const { bad } = await verifySegment(request)
    expect({ at, found: bad.length > 0 }).toEqual({ at, found: true })
    if (at >= 128 && at < framesEndBytes) {
      const hit = places.findLast((one) => one.offsetBytes <= at)?.frame.readUInt32LE(8)
      expect(bad[0].firstSeq).toBe(hit)
      if (at % 7 === 0) expect(await readAll(first, 0, places)).toEqual([hit])
    }
    await flip(path, at)
  }
  expect(await verifySegment(request)).toMatchObject({ bad: [] })
  await first[Symbol.asyncDispose]()

  // Header and trailer are what an open looks at.
  const original = await readFile(path)
  for (let at = 0; at < fileBytes; at = at === 127 ? fileBytes - 128 : at + 1) {
    await writeFile(path, original)
    await flip(path, at)
    await using store = await openStore(directory.path, sealer, { segmentRecords: 5 })
    // A trailer can be made again from the frames: then the segment is reported as sealed again.
    expect({ at, reported: covers(store.damage(), 6) || store.openReport.resealed.includes(0) }).toEqual({ at, reported: true })
    expect(store.durableSeq).toBe(8)
    expect(await readAll(store, 0, places)).toEqual([])
    await store.sealingIdle()
  }
}, 240_000)

test('a segment whose sealing was interrupted at any byte is sealed again, to the same bytes', async () => {
  await using directory = await memoryDirectory()
  const first = await openReadyStore(directory.path, sealer, { segmentRecords: 5 })
  for (const frame of FRAMES) first.accept(Buffer.from(frame))
  first.accept(buildFrame({ firstSeq: 7, records: [{ kind: RecordKind.zero }] }))
  await first.flush()
  await first.sealingIdle()
  const [{ path, framesEndBytes }] = first.segments
  await first[Symbol.asyncDispose]()
  const original = await readFile(path)
  for (let cut = framesEndBytes; cut < original.length; cut += cut < original.length - 130 ? 41 : 1) {
    await writeFile(path, original.subarray(0, cut))
    await using store = await openStore(directory.path, sealer, { segmentRecords: 5 })
    expect(store.openReport.resealed).toEqual([0])
    await store.sealingIdle()
    expect(store.damage()).toEqual([])
    expect((await readFile(path)).equals(original)).toBe(true)
  }
}, 120_000)
