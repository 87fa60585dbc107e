import { afterEach, expect, jest, test } from '@jest/globals'
import { CdpError } from '../../core/errors/index.ts'
import type { NbdClient } from '../../core/nbd/index.ts'
import { RecordKind } from '../../core/record/index.ts'
import { HashMark } from '../../core/stream/index.ts'
import { SlabPool } from '../buffer/index.ts'
import { CompareScan, DeltaRun, DurableProgress, RaceGuard, RecordedSince } from './index.ts'
import type { HashSource } from './index.ts'

const MiB = 1024 * 1024
const DISK_BYTES = 4 * MiB
afterEach(() => void jest.restoreAllMocks())
const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))

/** A disk of data of which the replica holds nothing; reads answer when they are told to. */
const runWith = (readInto: (offsetBytes: number) => Promise<void>, sizeBytes = DISK_BYTES, statusOf: (offsetBytes: number) => Promise<number> = async () => 0, ask?: HashSource['ask']) => {
  let nowMs = 0
  jest.spyOn(performance, 'now').mockImplementation(() => (nowMs += 2000))
  const guard = new RaceGuard()
  const progress: number[] = []
  const sent: number[] = []
  const client = {
    blockStatus: async (offsetBytes: number, lengthBytes: number) => new Map([['base:allocation', [{ lengthBytes, flags: await statusOf(offsetBytes) }]]]),
    readInto: async (target: Buffer, _at: number, offsetBytes: number) => {
      await readInto(offsetBytes)
      target.fill(1)
      return []
    },
  } as unknown as NbdClient
  const run = new DeltaRun({
    disk: { disk: 0, sizeBytes }, client, guard, slabs: new SlabPool(MiB, MiB), admit: async () => undefined, onProgress: () => undefined, readsInFlight: 8, signal: new AbortController().signal,
    hashes: { asOfSeq: () => 1, ask: ask ?? (async ({ extentCount }) => ({ marks: new Uint8Array(extentCount).fill(HashMark.zero), hashes: Buffer.alloc(0) })) },
    sink: {
      sync: (_disk, offsetBytes) => void sent.push(offsetBytes),
      takeLarge: (_kind, _disk, offsetBytes) => void sent.push(offsetBytes),
      range: (kind, _disk, offsetBytes) => void (kind === RecordKind.syncProgress && progress.push(offsetBytes)),
    },
  }).run(0)
  run.catch(() => undefined)
  return { run, guard, progress, sent }
}

test('progress never passes a read that failed, and what is read after that becomes no record', async () => {
  const gates = Array.from({ length: 4 }, () => Promise.withResolvers<void>())
  const { run, guard, progress, sent } = runWith((offsetBytes) => gates[offsetBytes / MiB].promise)
  gates[1].resolve()
  while (sent.length === 0) await turn()
  gates[0].reject(new CdpError('NBD_REFUSED', 'EIO'))
  await turn()
  for (const gate of gates.slice(2)) gate.resolve()
  await expect(run).rejects.toMatchObject({ code: 'NBD_REFUSED' })
  while (guard.busy) await turn()
  expect(sent).toEqual([MiB])
  expect(progress).toEqual([])
})

test('a read that fails while the rest of the disk is found empty is not passed either', async () => {
  const failing = Promise.withResolvers<void>()
  const rest = Promise.withResolvers<number>()
  const restAsked = Promise.withResolvers<void>()
  const reads: number[] = []
  const { run, progress, sent } = runWith(async (offsetBytes) => {
    reads.push(offsetBytes)
    if (offsetBytes === 15 * MiB) await failing.promise
  }, 32 * MiB, async (offsetBytes) => {
    if (offsetBytes === 0) return 0
    restAsked.resolve()
    return rest.promise
  })
  await restAsked.promise
  while (sent.length < 15) await turn()
  expect(reads).toHaveLength(16)
  const before = progress.length
  failing.reject(new CdpError('NBD_REFUSED', 'EIO'))
  await turn()
  rest.resolve(3)
  await expect(run).rejects.toMatchObject({ code: 'NBD_REFUSED' })
  expect(progress.slice(before)).toEqual([])
  expect(Math.max(0, ...progress)).toBeLessThanOrEqual(15 * MiB)
})

test('a delta sync begins where it is told to, and says when all is done', async () => {
  const { run, progress, sent } = runWith(async () => undefined)
  await run
  expect(sent).toHaveLength(4)
  expect(progress.at(-1)).toBe(DISK_BYTES)
  expect(progress).toEqual(progress.toSorted((a, b) => a - b))
})

test('an agent that does not answer gets a full copy, and is not asked again', async () => {
  let asked = 0
  const { run, progress, sent } = runWith(async () => undefined, 96 * MiB, async () => 0, async () => {
    asked++
    throw new CdpError('TIMEOUT', 'the agent did not say what it holds in time')
  })
  await run
  expect(sent).toHaveLength(96)
  expect(progress.at(-1)).toBe(96 * MiB)
  expect(asked).toBeLessThanOrEqual(3)
})

test('a verify of an agent that does not answer says so, and calls nothing different', async () => {
  const different: number[] = []
  const scan = new CompareScan({
    disk: { disk: 0, sizeBytes: DISK_BYTES }, client: {} as NbdClient, guard: new RaceGuard(), slabs: new SlabPool(MiB, MiB), admit: async () => undefined, onProgress: () => undefined, readsInFlight: 2,
    signal: new AbortController().signal, differsIfUnanswered: false, hashes: { asOfSeq: () => 1, ask: async () => Promise.reject(new CdpError('IO', 'the hash worker failed')) },
    sink: { zeroes: ({ offsetBytes }) => void different.push(offsetBytes), data: ({ offsetBytes }) => different.push(offsetBytes) > 0 },
  })
  await expect(scan.run(0, DISK_BYTES)).rejects.toMatchObject({ code: 'IO' })
  expect(different).toEqual([])
})

test('progress counts when everything before it is durable, the newest of each disk', () => {
  const progress = new DurableProgress()
  expect(progress.take(9)).toBeUndefined()
  progress.note(0, 100, 3)
  progress.note(0, 50, 4)
  progress.note(0, 200, 5)
  progress.note(1, 7, 6)
  expect(progress.take(2)).toBeUndefined()
  expect(progress.take(5)).toEqual({ 0: 200 })
  expect(progress.take(5)).toBeUndefined()
  progress.clear()
  expect(progress.take(99)).toBeUndefined()
})

test('an operation marks every extent that it touches, and no other', () => {
  const recorded = new RecordedSince([{ disk: 2, sizeBytes: MiB }])
  recorded.mark(2, 65_536 - 512, 1024)
  recorded.mark(2, MiB - 512, 512)
  recorded.mark(7, 0, 512)
  const touched = Array.from({ length: 16 }, (_, extent) => extent).filter((extent) => recorded.has(2, extent * 65_536 + 512))
  expect(touched).toEqual([0, 1, 15])
  expect(recorded.has(7, 0)).toBe(false)
})
