import { expect, test } from '@jest/globals'
import { RateCell } from '../replicate/index.ts'
import { BandwidthKeeper } from './bandwidth-keeper.ts'
import type { LineUser } from './bandwidth-keeper.ts'

const KiB = 1024
const user = (changes: Partial<LineUser> = {}): LineUser => ({ rate: new RateCell(), priority: 'normal', sentBytes: 0, waitingBytes: 0, ...changes })
const keeperOf = (users: readonly LineUser[], bytesPerSec: number, at = '2026-11-24T12:00:00'): BandwidthKeeper =>
  new BandwidthKeeper({ bandwidth: { bytesPerSec, windows: [{ days: ['tue'], from: '22:00', to: '23:00', bytesPerSec: 0 }] }, users: () => users, nowUnixMs: () => new Date(at).getTime() })

test('a first copy leaves the others what they need, and takes the rest', () => {
  const [copy, busy, idle] = [user({ waitingBytes: 1e9 }), user({ waitingBytes: 100 * KiB }), user()]
  const users = [copy, busy, idle]
  using keeper = keeperOf(users, 1600 * KiB)
  keeper.divide()
  expect(busy.rate.bytesPerSec).toBe(100 * KiB)
  expect(copy.rate.bytesPerSec).toBeGreaterThan(1400 * KiB)
  expect(idle.rate.bytesPerSec).toBeGreaterThan(0)
  busy.sentBytes += 300 * KiB
  busy.waitingBytes = 0
  keeper.divide()
  expect(busy.rate.bytesPerSec).toBe(300 * KiB)
})

test('a group of high priority gets four times what a low one gets when both want all', () => {
  const [low, high] = [user({ priority: 'low', waitingBytes: 1e9 }), user({ priority: 'high', waitingBytes: 1e9 })]
  using keeper = keeperOf([low, high], 3200 * KiB)
  keeper.divide()
  expect(high.rate.bytesPerSec / low.rate.bytesPerSec).toBeGreaterThan(3)
  expect(high.rate.bytesPerSec + low.rate.bytesPerSec).toBeLessThanOrEqual(3202 * KiB)
})

test('where there is no limit, or none at this time, nobody is held back', () => {
  const one = user({ waitingBytes: 1e9 })
  keeperOf([one], 0).divide()
  expect(one.rate.bytesPerSec).toBe(0)
  keeperOf([one], 1000 * KiB).divide()
  expect(one.rate.bytesPerSec).toBe(1000 * KiB)
  keeperOf([one], 1000 * KiB, '2026-11-24T22:30:00').divide()
  expect(one.rate.bytesPerSec).toBe(0)
})
