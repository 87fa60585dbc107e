import { expect, test } from '@jest/globals'
import { FrameBuffers } from './frame-buffers.ts'

test('a buffer that was given back serves the next frame of its size, and only one at a time', () => {
  const buffers = new FrameBuffers(1024 * 1024)
  const first = buffers.take(70_000)
  expect(first.length).toBe(70_000)
  const second = buffers.take(70_000)
  expect(second.buffer).not.toBe(first.buffer)
  buffers.give(first)
  const third = buffers.take(100_000)
  expect(third.buffer).toBe(first.buffer)
  expect(third.length).toBe(100_000)
  expect(buffers.take(100_000).buffer).not.toBe(first.buffer)
})

test('what is kept free is bounded', () => {
  const buffers = new FrameBuffers(128 * 1024)
  const [one, two] = [buffers.take(128 * 1024), buffers.take(128 * 1024)]
  buffers.give(one)
  buffers.give(two)
  expect(buffers.take(128 * 1024).buffer).toBe(one.buffer)
  expect(buffers.take(128 * 1024).buffer).not.toBe(two.buffer)
})
