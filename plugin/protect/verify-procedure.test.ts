import { expect, test } from '@jest/globals'
import type { DiskRange, VerifyVerdict } from '../sync/index.ts'
import { compareAll, describeRanges } from './verify-procedure.ts'

const EXTENT = 65_536
const extent = (number: number): DiskRange => ({ disk: 0, offsetBytes: number * EXTENT, lengthBytes: EXTENT })
const whole: DiskRange[] = [{ disk: 0, offsetBytes: 0, lengthBytes: 100 * EXTENT }]
type Round = { left?: DiskRange[] } & Partial<VerifyVerdict>

const run = async (rounds: readonly Round[], abort = new AbortController()) => {
  const asked: DiskRange[][] = []
  const steps: string[] = []
  const report = await compareAll(whole, {
    compare: async (ranges) => {
      const { left = [], differences = [], undecided = [] } = rounds[Math.min(asked.length, rounds.length - 1)]
      asked.push(ranges)
      steps.push('compare')
      return { comparedBytes: 10, left, suspects: differences.length + undecided.length }
    },
    drain: async () => void steps.push('drain'),
    judge: async () => {
      steps.push('judge')
      const { differences = [], undecided = [] } = rounds[Math.min(asked.length - 1, rounds.length - 1)]
      return { differences, undecided }
    },
  }, { signal: abort.signal, onProgress: (comparedBytes) => comparedBytes >= 1000 && abort.abort(new Error('enough')) })
  return { asked, steps, report }
}

test('where nothing differs one look is enough, and QEMU is not made to drain', async () => {
  const { steps, report } = await run([{}])
  expect(steps).toEqual(['compare', 'judge'])
  expect(report).toEqual({ comparedBytes: 10, undecidedBytes: 0, differingBytes: 0, differences: [] })
})

test('QEMU drains between the reads and the verdict; what was written meanwhile is looked at again', async () => {
  const { asked, steps, report } = await run([{ differences: [extent(3)], undecided: [extent(5), extent(6)] }, { undecided: [extent(6)] }, {}])
  expect(asked).toEqual([whole, [extent(5), extent(6)], [extent(6)]])
  expect(steps).toEqual(['compare', 'drain', 'judge', 'compare', 'drain', 'judge', 'compare', 'judge'])
  expect(report).toMatchObject({ differingBytes: EXTENT, differences: [extent(3)], undecidedBytes: 0 })
})

test('what is written all the time is undecided after five looks, and no difference', async () => {
  const { asked, report } = await run([{ undecided: [extent(5)] }])
  expect(asked).toHaveLength(5)
  expect(report).toMatchObject({ differingBytes: 0, differences: [], undecidedBytes: EXTENT })
})

test('too many suspects at once are judged before the rest is looked at, all in the first look', async () => {
  const rest = [{ disk: 0, offsetBytes: 50 * EXTENT, lengthBytes: 50 * EXTENT }]
  const { asked, report } = await run([{ left: rest, undecided: [extent(1)], differences: [extent(2)] }, { differences: [extent(60)] }, {}])
  expect(asked).toEqual([whole, rest, [extent(1)]])
  expect(report).toMatchObject({ differingBytes: 2 * EXTENT, differences: [extent(2), extent(60)] })
})

test('however much differs, a thousand extents are told one by one and all are counted', async () => {
  const { report } = await run([{ left: whole, differences: Array.from({ length: 512 }, (_, n) => extent(n)) }, { left: whole, differences: Array.from({ length: 512 }, (_, n) => extent(n)) }, {}])
  expect([report.differences.length, report.differingBytes]).toEqual([1000, 1024 * EXTENT])
})

test('it ends when it is told to', async () => {
  await expect(run([{ left: whole }])).rejects.toThrow('enough')
})

test('an operator reads the first places with their disks', () => {
  const entries = [{ disk: 0, key: 'scsi0', sizeBytes: 1 }]
  expect(describeRanges([extent(1)], entries)).toBe('scsi0 at 65536 (65536 bytes)')
  expect(describeRanges([extent(1), extent(2), extent(3), extent(4)], entries)).toBe('scsi0 at 65536 (65536 bytes), scsi0 at 131072 (65536 bytes), scsi0 at 196608 (65536 bytes) and more')
  expect(describeRanges([], entries)).toBe('')
})
