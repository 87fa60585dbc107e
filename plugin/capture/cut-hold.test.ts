import { afterEach, beforeEach, expect, jest, test } from '@jest/globals'
import { CutHold } from './cut-hold.ts'

beforeEach(() => void jest.useFakeTimers())
afterEach(() => void jest.useRealTimers())

test('what is held is sent once, at the end or when the time is over', () => {
  let sent = 0
  const hold = new CutHold(() => sent++)
  expect(hold.begin('one', 7, 20)).toBe(true)
  jest.advanceTimersByTime(19)
  expect(hold.isOn).toBe(true)
  jest.advanceTimersByTime(1)
  expect([hold.isOn, sent]).toEqual([false, 1])
  hold.end()
  expect(sent).toBe(1)
})

test('a commit of a cut whose hold has lapsed finds nothing, although another cut holds', () => {
  const hold = new CutHold(() => undefined)
  hold.begin('one', 7, 20)
  jest.advanceTimersByTime(20)
  expect(hold.begin('two', 9, 20)).toBe(true)
  expect(hold.namedSeq('one')).toBeUndefined()
  expect(hold.namedSeq('two')).toBe(9)
})

test('one cut at a time', () => {
  const hold = new CutHold(() => undefined)
  hold.begin('one', 7, 20)
  expect(hold.begin('two', 9, 20)).toBe(false)
  expect(hold.namedSeq('one')).toBe(7)
})
