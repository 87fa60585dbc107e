import { describe, expect, test } from '@jest/globals'
import { DAYS, RateCell, RateLimit, divide, limitAt } from './index.ts'
import type { Bandwidth } from './index.ts'

describe('the limit of a moment', () => {
  const office: Bandwidth = {
    bytesPerSec: 0,
    windows: [
      { days: ['mon', 'tue', 'wed', 'thu', 'fri'], from: '08:00', to: '18:00', bytesPerSec: 1_000 },
      { days: ['fri'], from: '22:00', to: '06:00', bytesPerSec: 2_000 },
    ],
  }
  // 2026-11-23 is a Monday.
  test.each([
    ['Monday at eight', '2026-11-23T08:00:00', 1_000],
    ['Monday a minute before', '2026-11-23T07:59:59', 0],
    ['Monday at six in the evening', '2026-11-23T18:00:00', 0],
    ['Friday night', '2026-11-27T23:30:00', 2_000],
    ['the morning after it', '2026-11-28T05:59:00', 2_000],
    ['when that is over', '2026-11-28T06:00:00', 0],
    ['Friday before dawn, which is Thursday\'s night', '2026-11-27T05:00:00', 0],
  ])('%s', (_name, at, limit) => expect(limitAt(office, new Date(at))).toBe(limit))

  test('the first window that holds counts; without one, the limit outside of windows', () => {
    const nested: Bandwidth = { bytesPerSec: 5, windows: [{ days: DAYS, from: '12:00', to: '13:00', bytesPerSec: 7 }, { days: DAYS, from: '00:00', to: '00:00', bytesPerSec: 6 }] }
    expect([limitAt(nested, new Date('2026-11-24T12:30:00')), limitAt(nested, new Date('2026-11-24T13:30:00')), limitAt({ bytesPerSec: 5, windows: [] }, new Date())]).toEqual([7, 6, 5])
  })
})

describe('dividing', () => {
  const rounded = (shares: number[]): number[] => shares.map(Math.round)

  test('who needs little gets it, a copy gets the rest', () => {
    const [copy, small, other] = divide(1_600_000, [{ weight: 2, bytesPerSec: 1e9 }, { weight: 2, bytesPerSec: 100_000 }, { weight: 2, bytesPerSec: 300_000 }])
    expect(rounded([small, other, copy])).toEqual([100_000, 300_000, 1_200_000])
  })

  test('weights count among those who want more than there is', () => {
    const [low, high] = divide(1000, [{ weight: 1, bytesPerSec: 1e9 }, { weight: 4, bytesPerSec: 1e9 }])
    expect(high / low).toBeGreaterThan(3)
    expect(low + high).toBeCloseTo(1000)
  })

  test('nobody is left without: an idle one has a floor, and what nobody needs is divided too', () => {
    const shares = divide(1600, [{ weight: 2, bytesPerSec: 0 }, { weight: 2, bytesPerSec: 1e9 }])
    expect(rounded(shares)).toEqual([50, 1550])
    expect(rounded(divide(1600, [{ weight: 2, bytesPerSec: 0 }, { weight: 2, bytesPerSec: 0 }]))).toEqual([800, 800])
  })

  test('random demands: the sum is the limit, nobody wants in vain while another has too much', () => {
    let state = 12345
    const random = (): number => (state = (Math.imul(state, 1_103_515_245) + 12_345) >>> 0) / 2 ** 32
    for (let round = 0; round < 2000; round++) {
      const demands = Array.from({ length: 1 + Math.floor(random() * 9) }, () => ({ weight: [1, 2, 4][Math.floor(random() * 3)], bytesPerSec: random() < 0.2 ? 0 : random() * 1000 }))
      const limit = 1 + random() * 3000
      const shares = divide(limit, demands)
      const floor = limit / demands.length / 16
      expect(shares.reduce((sum, share) => sum + share, 0)).toBeCloseTo(limit, 3)
      const wanting = demands.some(({ bytesPerSec }, at) => shares[at] < bytesPerSec - 1e-6)
      const wasting = demands.some(({ bytesPerSec }, at) => shares[at] > Math.max(bytesPerSec, floor) + 1e-6)
      expect(wanting && wasting).toBe(false)
    }
  })
})

describe('a rate limit', () => {
  test('over any time it lets through its rate and one frame, whatever the sizes; a change counts at once', () => {
    let nowMs = 0
    const cell = new RateCell()
    cell.bytesPerSec = 1024 * 100
    const limit = new RateLimit(new RateCell(cell.buffer), () => nowMs)
    let sent = 0
    const run = (untilMs: number, frameBytes: number): void => {
      while (nowMs < untilMs) {
        const waitMs = limit.waitMs()
        if (waitMs > 0) {
          nowMs += waitMs
          continue
        }
        limit.spend(frameBytes)
        sent += frameBytes
      }
    }
    run(10_000, 1000)
    expect(sent / (1024 * 100)).toBeCloseTo(10, 0)
    sent = 0
    run(30_000, 1024 * 1024)
    expect(sent / (1024 * 100)).toBeGreaterThan(9)
    expect(sent / (1024 * 100)).toBeLessThan(31)
    cell.bytesPerSec = 0
    expect(limit.waitMs()).toBe(0)
    limit.spend(1e9)
    expect(limit.waitMs()).toBe(0)
  })

  test('nobody waits longer than a second before he asks again', () => {
    const cell = new RateCell()
    cell.bytesPerSec = 1024
    const limit = new RateLimit(cell, () => 0)
    limit.spend(1e9)
    expect(limit.waitMs()).toBe(1000)
  })
})
