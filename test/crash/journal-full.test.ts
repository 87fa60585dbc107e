import { rm, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { SegmentSealer } from '../../agent/journal/index.ts'
import type { VmStore } from '../../agent/journal/index.ts'
import { buildFrame, openReadyStore, openStore } from '../../agent/journal/testing.ts'
import { errorCode, toCdpError } from '../../core/errors/index.ts'
import { RecordKind } from '../../core/record/index.ts'
import { smallFileSystem } from '../kit/small-file-system.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

const bigWrite = (firstSeq: number): Buffer => buildFrame({ firstSeq, records: [{ kind: RecordKind.write, lengthBytes: 1024 * 1024, fill: firstSeq }] })

/** Appends until the store refuses; returns how. */
const fill = async (store: VmStore): Promise<unknown> => {
  for (;;) {
    try {
      for (let burst = 0; burst < 3; burst++) store.accept(bigWrite(store.receivedSeq + 1))
    } catch (error) {
      return error
    }
    await store.flush()
  }
}

const sequences = async (store: VmStore): Promise<number[]> => {
  const found: number[] = []
  for (const { segmentNumber } of store.segments) {
    for await (const { header } of store.recordsOf(segmentNumber)) found.push(header.firstSeq)
  }
  return found
}
const upTo = (last: number): number[] => Array.from({ length: last - 1 }, (_, at) => at + 2)

test.each([
  ['inside a segment', undefined],
  ['when a segment begins', 1],
])('a full file system (%s): refused by name, cut back, readable, and going on when there is room', async (_, segmentRecords) => {
  await using disk = await smallFileSystem(64)
  const ballast = join(disk.path, 'ballast')
  const directory = join(disk.path, 'vm')
  await using store = await openReadyStore(directory, sealer, { segmentRecords })
  const stopped: string[] = []
  store.onStopped = (error) => stopped.push(String(error.context.condition))
  await writeFile(ballast, Buffer.alloc(32 * 1024 * 1024))
  const refused = toCdpError(await fill(store))
  expect({ code: errorCode(refused), condition: refused.context.condition, retry: refused.retry }).toEqual({ code: 'IO', condition: 'full', retry: true })
  expect({ condition: store.condition, stopped }).toEqual({ condition: 'full', stopped: ['full'] })
  await expect(store.resumeEpoch(1)).rejects.toMatchObject({ context: { condition: 'full' } })
  const heldSeq = store.durableSeq
  expect(heldSeq).toBeGreaterThan(10)
  expect(await sequences(store)).toEqual(upTo(heldSeq))
  const active = store.segments[store.segments.length - 1]
  expect((await stat(active.path)).size).toBe(active.framesEndBytes)

  await rm(ballast)
  await expect(store.resumeEpoch(1)).resolves.toMatchObject({ durableSeq: heldSeq })
  store.accept(bigWrite(heldSeq + 1))
  await store.flush()
  expect(store).toMatchObject({ condition: 'open', durableSeq: heldSeq + 1 })
  expect(await sequences(store)).toEqual(upTo(heldSeq + 1))
  await store[Symbol.asyncDispose]()
  await using again = await openStore(directory, sealer)
  expect(again.damage()).toEqual([])
  expect(again.openReport.tornTail).toBeUndefined()
  expect(again.durableSeq).toBe(heldSeq + 1)
}, 60_000)

test('a full file system during the initial sync: nothing is acknowledged that is not there, and it goes on from there', async () => {
  await using disk = await smallFileSystem(48)
  const ballast = join(disk.path, 'ballast')
  await using store = await openStore(join(disk.path, 'vm'), sealer)
  await store.beginEpoch([{ disk: 0, key: 'scsi0', sizeBytes: 1024 ** 3 }])
  const direct = (firstSeq: number): Buffer =>
    buildFrame({ firstSeq, direct: true, records: [{ kind: RecordKind.sync, offsetBytes: firstSeq * 1024 * 1024, lengthBytes: 1024 * 1024, fill: 7 }] })
  await writeFile(ballast, Buffer.alloc(40 * 1024 * 1024))
  expect(() => {
    for (let seq = 1; seq < 4; seq++) store.accept(direct(seq))
  }).not.toThrow()
  await store.flush()
  const heldSeq = store.durableSeq
  const stopped = Promise.withResolvers<void>()
  store.onStopped = () => stopped.resolve()
  for (let seq = heldSeq + 1; seq <= heldSeq + 12; seq++) store.accept(direct(seq))
  await stopped.promise
  expect(store).toMatchObject({ condition: 'full', durableSeq: heldSeq, receivedSeq: heldSeq })
  await rm(ballast)
  await expect(store.resumeEpoch(1)).resolves.toMatchObject({ durableSeq: heldSeq, baseComplete: false })
  for (let seq = heldSeq + 1; seq <= heldSeq + 12; seq++) store.accept(direct(seq))
  await store.flush()
  expect(store.durableSeq).toBe(heldSeq + 12)
}, 60_000)
