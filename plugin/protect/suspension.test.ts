import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from '@jest/globals'
import { silentLogger } from '../../core/log/index.ts'
import { Suspension } from './suspension.ts'
import type { Hold } from './suspension.ts'

let dir = ''
let nowUnixMs = 1_000_000
let expired: Hold[] = []
let changes = 0
let onExpired = (): void => undefined
const opened: Suspension[] = []
const open = (stateDirectory = dir): Suspension => {
  const suspension = new Suspension({
    stateDirectory, vmId: 100, log: silentLogger, nowUnixMs: () => nowUnixMs, onChange: () => void changes++,
    onExpired: (hold) => {
      expired.push(hold)
      onExpired()
    },
  })
  opened.push(suspension)
  return suspension
}
beforeEach(async () => {
  dir = await mkdtemp('/tmp/cdp-')
  nowUnixMs = 1_000_000
  expired = []
  changes = 0
})
afterEach(async () => {
  for (const suspension of opened.splice(0)) suspension[Symbol.dispose]()
  await rm(dir, { recursive: true, force: true })
})
const ownersOf = (suspension: Suspension): string[] => suspension.holds.map(({ owner }) => owner)

test('owners are independent: it is held until the last one lets go, and letting go of nothing changes nothing', async () => {
  const suspension = open()
  await suspension.add({ owner: 'qm', reason: 'resize', forMs: 60_000 })
  await suspension.add({ owner: 'ann', reason: 'storage', forMs: 60_000 })
  await suspension.add({ owner: 'qm', reason: 'move', forMs: 90_000 })
  expect(suspension.why).toBe('held by qm: move; ann: storage')
  expect(suspension.holds[0]).toEqual({ owner: 'qm', reason: 'move', sinceUnixMs: 1_000_000, untilUnixMs: 1_090_000 })
  expect([await suspension.release('qm'), await suspension.release('qm'), await suspension.release('bob')]).toEqual([true, false, false])
  expect(ownersOf(suspension)).toEqual(['ann'])
  expect(changes).toBe(4)
  await suspension.release('ann')
  expect(suspension.why).toBeUndefined()
})

test('it is kept over a restart until its limit, which a stepped clock never makes longer', async () => {
  const first = open()
  await first.add({ owner: 'qm', reason: 'resize', forMs: 60_000 })
  await first.add({ owner: 'ann', reason: 'x', forMs: 1_000 })
  first[Symbol.dispose]()
  nowUnixMs += 20_000
  const second = open()
  await second.load()
  expect(second.holds).toEqual([{ owner: 'qm', reason: 'resize', sinceUnixMs: 1_000_000, untilUnixMs: 1_060_000 }])
  second[Symbol.dispose]()
  nowUnixMs -= 500_000
  const third = open()
  await third.load()
  expect(third.holds.map(({ untilUnixMs }) => untilUnixMs - nowUnixMs)).toEqual([60_000, 1_000])
})

test('at its limit a hold is gone, in memory and on disk, and that is told', async () => {
  const told = Promise.withResolvers<undefined>()
  onExpired = () => told.resolve(undefined)
  const suspension = open()
  await suspension.add({ owner: 'qm', reason: 'resize', forMs: 20 })
  await told.promise
  expect(expired).toMatchObject([{ owner: 'qm', reason: 'resize' }])
  expect(suspension.holds).toEqual([])
  // Waits for the file, as every change does.
  await suspension.release('qm')
  await suspension.add({ owner: 'ann', reason: 'x', forMs: 60_000 })
  const next = open()
  await next.load()
  expect(ownersOf(next)).toEqual(['ann'])
})

test('a file that makes no sense holds nothing; one that cannot be read or written refuses nothing', async () => {
  for (const text of ['{"format', '[]', '{"holds":[{"owner":5},null,{"owner":"a","reason":"b","sinceUnixMs":5,"untilUnixMs":4}]}']) {
    await writeFile(join(dir, 'suspended-100.json'), text)
    const suspension = open()
    await suspension.load()
    expect(suspension.holds).toEqual([])
  }
  await rm(join(dir, 'suspended-100.json'))
  await mkdir(join(dir, 'suspended-100.json'))
  const unreadable = open()
  await unreadable.load()
  expect(unreadable.holds).toEqual([])
  // Neither can it be written there.
  const suspension = open()
  await suspension.add({ owner: 'qm', reason: 'resize', forMs: 60_000 })
  expect(ownersOf(suspension)).toEqual(['qm'])
  await suspension.release('qm')
  expect(suspension.holds).toEqual([])
})
