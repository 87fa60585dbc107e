import { expect, test } from '@jest/globals'
import { DurableLag } from './durable-lag.ts'

test('the lag is that of the oldest record that is not durable, as far as it was noted', () => {
  const lag = new DurableLag()
  expect(lag.ms(0, 5_000)).toBe(0)
  lag.note(10, 1_000)
  lag.note(10, 1_400)
  lag.note(12, 1_010)
  lag.note(20, 1_500)
  expect(lag.ms(9, 2_000)).toBe(1_000)
  expect(lag.ms(10, 2_000)).toBe(500)
  expect(lag.ms(20, 2_000)).toBe(0)
  lag.note(21, 3_000)
  expect(lag.ms(20, 3_250)).toBe(250)
})
