import { expect, test } from '@jest/globals'
import { CopyPace } from './copy-pace.ts'

const MiB = 1024 * 1024

/** A copy as fast as it may over a line of that many bytes a second; reads are of 1 MiB. @returns the most that ever waited, and what was copied in the last second */
const copied = (bytesPerSec: number, seconds: number): { mostWaiting: number; lastSecond: number } => {
  const pace = new CopyPace()
  let [waiting, durable, mostWaiting, lastSecond] = [0, 0, 0, 0]
  for (let ms = 0; ms < seconds * 1_000; ms++) {
    const sent = Math.min(waiting, bytesPerSec / 1_000)
    waiting -= sent
    durable += sent
    while (pace.hasRoom(waiting, durable, ms)) {
      waiting += MiB
      if (ms >= (seconds - 1) * 1_000) lastSecond += MiB
    }
    mostWaiting = Math.max(mostWaiting, waiting)
  }
  return { mostWaiting, lastSecond }
}

test.each([128 * 1024, MiB, 16 * MiB, 256 * MiB])('on a line of %d bytes a second no more waits than a second and two reads of it, and the line is full', (bytesPerSec) => {
  const { mostWaiting, lastSecond } = copied(bytesPerSec, 20)
  expect(mostWaiting).toBeLessThanOrEqual(bytesPerSec + 2 * MiB)
  expect(lastSecond).toBeGreaterThanOrEqual(bytesPerSec - 2 * MiB)
})

test('what the guest writes counts: a copy waits for it', () => {
  const pace = new CopyPace()
  for (let ms = 0; ms <= 2_000; ms += 50) pace.hasRoom(0, ms * 1_000, ms)
  expect(pace.hasRoom(1.9 * MiB, 2_000_000, 2_000)).toBe(true)
  expect(pace.hasRoom(2 * MiB, 2_000_000, 2_000)).toBe(false)
  // Nothing became durable for a long time: what it was before counts no more.
  expect(pace.hasRoom(1.1 * MiB, 2_000_000, 12_000)).toBe(false)
})
