import { describe, expect, test } from '@jest/globals'
import { AckMeter } from './ack-meter.ts'

describe('AckMeter', () => {
  test('tells quantiles within a fifth, the exact worst, and begins anew with each look', () => {
    const meter = new AckMeter()
    for (let us = 1; us <= 10_000; us++) meter.add(us, 1, false)
    const { count, p50Us, p99Us, maxUs } = meter.take()
    expect([count, maxUs]).toEqual([10_000, 10_000])
    expect(Math.abs(p50Us - 5000)).toBeLessThan(1000)
    expect(Math.abs(p99Us - 9900)).toBeLessThan(1980)
    expect(meter.take()).toMatchObject({ count: 0, p50Us: 0, p99Us: 0, maxUs: 0 })
  })

  test('a batch counts as many times as it has requests', () => {
    const meter = new AckMeter()
    meter.add(10, 990, false)
    meter.add(1_000_000, 10, false)
    expect(meter.take().p50Us).toBeLessThan(13)
    meter.add(10, 98, false)
    meter.add(1_000_000, 2, false)
    expect(meter.take().p99Us).toBeGreaterThan(800_000)
  })

  test('zero, negative (a clock that jitters) and enormous latencies do not break it', () => {
    const meter = new AckMeter()
    for (const us of [0, -3, 1e12]) meter.add(us, 1, false)
    expect(meter.take()).toMatchObject({ count: 3, maxUs: 1e12 })
  })
})
