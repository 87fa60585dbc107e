import { cp, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { SegmentSealer, VmStore } from '../../agent/journal/index.ts'
import type { JournalMark } from '../../agent/journal/index.ts'
import { temporaryDirectory } from '../../agent/journal/testing.ts'
import { silentLogger } from '../../core/log/index.ts'

const FIXTURE = join(import.meta.dirname, '../fixtures/v1/journal')
const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

test('a journal of format version 1 opens, reads and verifies as on the day it was written', async () => {
  await using directory = await temporaryDirectory()
  await cp(FIXTURE, directory.path, { recursive: true })
  const marks: JournalMark[] = []
  const frames: { segment: number; firstSeq: number; kinds: number[]; payload: string }[] = []
  {
    await using store = await VmStore.open({ directory: directory.path, vm: 'fixture/100', log: silentLogger, clock: { nowUnixMs: Date.now }, sealer })
    expect(store).toMatchObject({ epoch: 2, durableSeq: 21, baseComplete: true, baseSeq: 7 })
    expect(store.segments.map(({ sealed, firstSeq, lastSeq }) => ({ sealed, firstSeq, lastSeq }))).toEqual([
      { sealed: true, firstSeq: 8, lastSeq: 14 },
      { sealed: false, firstSeq: 15, lastSeq: 21 },
    ])
    expect(store.segments[0].digest?.toString('hex')).toBe('e2b4a36a072ae7438a1253f818033bc4cfd6059d6fac07b5c3beae30b0b2dc4a')
    for await (const mark of store.marks()) marks.push(mark)
    for (const { segmentNumber } of store.segments) {
      for await (const { header, table, frameOffset } of store.recordsOf(segmentNumber)) {
        const kinds = Array.from({ length: table.count }, (_, index) => table.kind(index))
        const { payload } = await store.readFrame(segmentNumber, frameOffset)
        frames.push({ segment: segmentNumber, firstSeq: header.firstSeq, kinds, payload: payload.subarray(0, 2).toString('hex') })
      }
    }
    expect(await store.verify()).toMatchObject({ segments: 2, frames: 4, records: 14, damage: [] })
  }
  expect(frames).toEqual([
    { segment: 0, firstSeq: 8, kinds: [1, 1, 2, 5], payload: '3333' },
    { segment: 0, firstSeq: 12, kinds: [3, 4, 1], payload: '5555' },
    { segment: 1, firstSeq: 15, kinds: [12, 5], payload: '7b22' },
    { segment: 1, firstSeq: 17, kinds: [11, 8, 6, 10, 5], payload: '7b22' },
  ])
  expect(marks.map(({ seq, epoch, is }) => `${seq}/${epoch} ${is}`)).toEqual([
    '11/1 checkpoint', '13/1 resize', '15/1 proof', '16/1 checkpoint', '17/2 epoch', '18/2 syncBegin', '20/2 syncEnd', '21/2 checkpoint',
  ])
  expect(marks[3]).toMatchObject({ is: 'checkpoint', namedSeq: 15, mark: { id: 'c-2', vpg: 'group', kind: 'tagged', tag: 'before the upgrade' } })
  const sealed = 'journal/0000000000000008.seg'
  expect((await readFile(join(directory.path, sealed))).equals(await readFile(join(FIXTURE, sealed)))).toBe(true)
})
