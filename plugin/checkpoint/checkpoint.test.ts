import { describe, expect, jest, test } from '@jest/globals'
import { loggerTo } from '../../core/log/index.ts'
import type { LogLine } from '../../core/log/index.ts'
import type { CheckpointMark } from '../../core/record/index.ts'
import type { CaptureWorker } from '../capture/index.ts'
import { GroupClock } from '../capture/index.ts'
import { CheckpointLabels, cronExpression, cutOnOneNode, scheduleCheckpoints } from './index.ts'

describe('labels', () => {
  test('grow by at least 1 ms whatever the clock does', () => {
    const labels = new CheckpointLabels()
    expect([1000, 1000, 400, 1001, 5000, 4999].map((nowUnixMs) => labels.next(nowUnixMs))).toEqual([1000, 1001, 1002, 1003, 5000, 5001])
  })
})

describe('the schedule', () => {
  test.each([[1000, '*/1 * * * * *'], [5000, '*/5 * * * * *'], [30_000, '*/30 * * * * *'], [60_000, '0 * * * * *'], [300_000, '0 */5 * * * *'], [3_600_000, '0 0 * * * *']])('every %d ms is %s', (everyMs, expression) => {
    expect(cronExpression(everyMs)).toBe(expression)
  })

  test.each([0, -1000, -60_000, 500, 1500, 7000, 61_000, 420_000, 7_200_000, NaN, Infinity])('every %d ms is refused with a hint', (everyMs) => {
    expect(() => cronExpression(everyMs)).toThrow(expect.objectContaining({ code: 'BAD_INPUT', hint: expect.stringContaining('Choose') }))
  })

  test('a cut that throws is logged, the next tick comes, and nothing comes after dispose', async () => {
    const lines: LogLine[] = []
    const twice = Promise.withResolvers<void>()
    let cuts = 0
    const schedule = scheduleCheckpoints(1000, loggerTo('debug', (line) => lines.push(line)), async () => {
      if (++cuts === 2) twice.resolve()
      throw new Error('no cut today')
    })
    await twice.promise
    schedule[Symbol.dispose]()
    expect(lines.some(({ level }) => level === 'error')).toBe(true)
    expect(cuts).toBe(2)
  })

  test.each([['back an hour', -3_600_000], ['forward a month', 30 * 86_400_000]])('a wall clock that steps %s stops no cuts, and holds nobody up', async (_, stepMs) => {
    let cuts = 0
    let thrice = Promise.withResolvers<void>()
    const schedule = scheduleCheckpoints(1000, loggerTo('debug', () => undefined), async () => {
      if (++cuts === 3) thrice.resolve()
    })
    await thrice.promise
    let longestTurnMs = 0
    let turnMs = performance.now()
    const turns = setInterval(() => {
      longestTurnMs = Math.max(longestTurnMs, performance.now() - turnMs)
      turnMs = performance.now()
    }, 5)
    const realNow = Date.now.bind(Date)
    const clock = jest.spyOn(Date, 'now').mockImplementation(() => realNow() + stepMs)
    try {
      cuts = 0
      const steppedAtMs = performance.now()
      thrice = Promise.withResolvers<void>()
      await thrice.promise
      // What the watchdog would end the plugin for.
      expect(longestTurnMs).toBeLessThan(1_000)
      expect(performance.now() - steppedAtMs).toBeLessThan(5_000)
    } finally {
      clock.mockRestore()
      clearInterval(turns)
      schedule[Symbol.dispose]()
    }
  }, 20_000)
})

describe('the group cut on one node', () => {
  const mark: CheckpointMark = { id: 'c', vpg: 'shop', vms: ['101'], atUnixMs: 1, kind: 'automatic' }
  const worker = (answer: () => Promise<unknown>, asked: unknown[] = []) => ({ ask: (name: string, ask: unknown) => (asked.push([name, ask]), answer()) }) as unknown as CaptureWorker

  test('raises the clock once and asks all with the value before it', async () => {
    const clock = new GroupClock()
    const asked: unknown[] = []
    clock.cut()
    expect(await cutOnOneNode(clock, [worker(async () => ({ namedSeq: 1 }), asked), worker(async () => ({ namedSeq: 2 }), asked)], mark)).toEqual({ ok: true })
    expect(asked).toEqual([['cut', { c: 1, mark }], ['cut', { c: 1, mark }]])
    expect(clock.read()).toBe(2)
  })

  test('is abandoned with the reason of the one that refused, or ended', async () => {
    const fine = worker(async () => ({ namedSeq: 1 }))
    expect(await cutOnOneNode(new GroupClock(), [fine, worker(async () => ({ refused: 'a sync is under way' }))], mark)).toEqual({ ok: false, why: 'a sync is under way' })
    expect(await cutOnOneNode(new GroupClock(), [fine, worker(() => Promise.reject(new Error('gone')))], mark)).toEqual({ ok: false, why: 'a capture worker ended' })
  })
})
