import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { describe, expect, test } from '@jest/globals'
import { FrameQueue, SlabPool } from './index.ts'
import type { QueuedFrame } from './index.ts'

const frame = (firstSeq: number, lastSeq = firstSeq, extra: Partial<QueuedFrame> = {}): QueuedFrame => {
  const head = Buffer.alloc(64)
  const payload = Buffer.alloc(512)
  return { firstSeq, lastSeq, head, payload, lengthBytes: head.length + payload.length, ...extra }
}

describe('FrameQueue', () => {
  test('takes no gap, no repetition and nothing out of order', () => {
    const queue = new FrameQueue(10)
    queue.push(frame(11, 13))
    for (const wrong of [frame(13), frame(15), frame(11, 13), frame(1)]) expect(() => queue.push(wrong)).toThrow(expect.objectContaining({ code: 'INTERNAL' }))
    queue.push(frame(14))
    expect(queue.length).toBe(2)
  })

  test('gives frames once, in order, and again from the first that is not durable after a rewind', () => {
    const queue = new FrameQueue()
    for (let seq = 1; seq <= 9; seq += 3) queue.push(frame(seq, seq + 2))
    expect([queue.next()?.firstSeq, queue.next()?.firstSeq]).toEqual([1, 4])
    queue.release(5)
    expect(queue.length).toBe(2)
    queue.rewind(5)
    expect([queue.next()?.firstSeq, queue.next()?.firstSeq, queue.next()]).toEqual([4, 7, undefined])
    queue.push(frame(10))
    expect(queue.next()?.firstSeq).toBe(10)
    queue.release(100)
    expect([queue.length, queue.heldBytes, queue.next()]).toEqual([0, 0, undefined])
  })

  test('what is durable before it was sent is not sent', () => {
    const queue = new FrameQueue()
    for (let seq = 1; seq <= 4; seq++) queue.push(frame(seq))
    queue.release(3)
    expect(queue.next()?.firstSeq).toBe(4)
  })

  test('counts slabs whole, gives them back once, and remembers its peak', () => {
    const pool = new SlabPool(4096, 8192)
    const queue = new FrameQueue()
    const slab = pool.take()
    queue.push(frame(1, 1, { slab, pool, payload: slab.subarray(0, 512) }))
    queue.push(frame(2))
    expect(queue.heldBytes).toBe(64 + 4096 + 64 + 512)
    queue.release(1)
    queue.release(1)
    queue.rewind(1)
    expect(queue.heldBytes).toBe(64 + 512)
    expect([pool.take() === slab, pool.take() === slab]).toEqual([true, false])
    expect(queue.peakBytes).toBe(64 + 4096 + 64 + 512)
    queue.clear(7)
    expect([queue.heldBytes, queue.length]).toEqual([0, 0])
    queue.push(frame(8))
  })

  test('ten thousand frames in and out leave the order and the bytes exact, whatever the queue compacts', () => {
    const queue = new FrameQueue()
    let sent = 0
    let durable = 0
    for (let seq = 1; seq <= 10_000; seq++) {
      queue.push(frame(seq))
      if (seq % 3 === 0) {
        for (let next = queue.next(); next !== undefined; next = queue.next()) if (next.firstSeq !== ++sent) throw new Error(`${next.firstSeq} instead of ${sent}`)
      }
      if (seq % 7 === 0) {
        durable = Math.max(durable, sent - (seq % 50))
        queue.release(durable)
      }
      if (seq % 1000 === 0) {
        queue.rewind(durable)
        sent = durable
      }
      if (queue.heldBytes !== (seq - durable) * 576) throw new Error(`${queue.heldBytes} bytes held at ${seq}`)
    }
    while (queue.next() !== undefined) sent++
    expect([queue.length, sent]).toEqual([10_000 - durable, 10_000])
  })

  test('a released frame is not kept alive by the queue', async () => {
    setFlagsFromString('--expose-gc')
    const collect = runInNewContext('gc') as () => void
    const queue = new FrameQueue()
    const refs: WeakRef<QueuedFrame>[] = []
    for (let seq = 1; seq <= 20; seq++) {
      const one = frame(seq)
      refs.push(new WeakRef(one))
      queue.push(one)
    }
    queue.release(10)
    await new Promise((resolve) => setImmediate(resolve))
    collect()
    expect(refs.map((ref) => ref.deref() !== undefined)).toEqual(Array.from({ length: 20 }, (_, at) => at >= 10))
    expect(queue.length).toBe(10)
  })
})

test('a pool keeps no more free slabs than its bound, and at least one', () => {
  const pool = new SlabPool(1024, 100)
  const [a, b] = [pool.take(), pool.take()]
  pool.give(a)
  pool.give(b)
  expect([pool.take() === a, pool.take() === b]).toEqual([true, false])
})
