import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from '@jest/globals'
import { CdpError } from '../../core/errors/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { VerifyRecords } from './verify-record.ts'
import { VerifySchedule } from './verify-schedule.ts'
import type { VmState } from './vm-state.ts'

const WEEK_MS = 7 * 24 * 3_600_000
let directory = ''
beforeEach(async () => {
  directory = await mkdtemp('/tmp/cdp-v-')
})
afterEach(() => rm(directory, { recursive: true, force: true }))
const report = (differingBytes = 0) => ({ comparedBytes: 100, undecidedBytes: 0, differingBytes, differences: [] })

const scene = (everyMs = WEEK_MS) => {
  const records = new VerifyRecords(directory)
  const clock = { nowUnixMs: 1_000_000 }
  const verified: number[] = []
  let fails = 0
  const streaming: VmState = { is: 'streaming', why: 'x', sinceUnixMs: 0 }
  const vmOf = (vmId: number, state: VmState = streaming) => ({
    vmId, state,
    verify: async () => {
      if (fails === vmId) throw new CdpError('ABORTED', 'capture was lost')
      verified.push(vmId)
      await records.write(vmId, clock.nowUnixMs, report())
      return report()
    },
  })
  const vms = [vmOf(101), vmOf(102), vmOf(103, { is: 'tracking', why: 'x', sinceUnixMs: 0 })]
  const schedule = new VerifySchedule({ everyMs, vms: () => vms, records, log: silentLogger, nowUnixMs: () => clock.nowUnixMs })
  return { records, clock, verified, schedule, fail: (vmId: number) => (fails = vmId) }
}

test('each streaming VM is verified an interval after it was first seen, then once in an interval', async () => {
  const { clock, verified, schedule } = scene()
  await schedule.look()
  clock.nowUnixMs += WEEK_MS - 1
  await schedule.look()
  expect(verified).toEqual([])
  clock.nowUnixMs += 1
  await schedule.look()
  await schedule.look()
  expect(verified).toEqual([101, 102])
  clock.nowUnixMs += WEEK_MS
  await schedule.look()
  expect(verified).toEqual([101, 102, 101, 102])
})

test('one that did not come to its end holds up no other, and is due again an hour later', async () => {
  const { clock, verified, schedule, fail } = scene()
  await schedule.look()
  clock.nowUnixMs += WEEK_MS
  fail(101)
  await schedule.look()
  expect(verified).toEqual([102])
  fail(0)
  clock.nowUnixMs += 3_600_000 - 1
  await schedule.look()
  expect(verified).toEqual([102])
  clock.nowUnixMs += 1
  await schedule.look()
  expect(verified).toEqual([102, 101])
})

test('what was found outlives the plugin; a stepped clock neither verifies all the time nor never again', async () => {
  const first = scene()
  await first.records.write(101, first.clock.nowUnixMs + 10 * WEEK_MS, report(65_536))
  await first.records.write(102, first.clock.nowUnixMs + 1000, report())
  const again = scene()
  await again.schedule.look()
  // Far in the future: that clock was wrong, so it is due. A little: it is not.
  expect(again.verified).toEqual([101])
  expect(await new VerifyRecords(directory).read(101)).toMatchObject({ atUnixMs: again.clock.nowUnixMs, foundEver: 1, differingBytes: 0 })
  again.clock.nowUnixMs += WEEK_MS + 1000
  await again.schedule.look()
  expect(again.verified).toEqual([101, 101, 102])
})

test('a record that cannot be understood counts as none', async () => {
  const records = new VerifyRecords(directory)
  await writeFile(join(directory, 'verify-101.json'), '{ not')
  expect(await records.read(101)).toBeUndefined()
  await writeFile(join(directory, 'verify-102.json'), '{"format": 1, "atUnixMs": "yesterday"}')
  expect(await records.read(102)).toBeUndefined()
  await records.write(101, 5, report())
  expect(JSON.parse(await readFile(join(directory, 'verify-101.json'), 'utf8'))).toEqual({ format: 1, atUnixMs: 5, comparedBytes: 100, undecidedBytes: 0, differingBytes: 0, foundEver: 0 })
})
