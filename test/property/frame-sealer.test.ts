import { randomFillSync } from 'node:crypto'
import { once } from 'node:events'
import type { Worker } from 'node:worker_threads'
import { describe, expect, test } from '@jest/globals'
import { FrameBuilder, RecordKind, adaptiveZstd, decodeFramePayload, parseFrame } from '../../core/record/index.ts'
import { Random, testSeed } from '../kit/random.ts'
import { SealingThread, inlineSealer } from '../../plugin/capture/frame-sealer.ts'
import type { FrameSealer, Sealed } from '../../plugin/capture/frame-sealer.ts'

const MiB = 1024 * 1024
const FRAMES = 150

const filled = (random: Random, firstSeq: number): { builder: FrameBuilder; raw: Buffer } => {
  const lengthBytes = 512 * random.int(1, random.chance(0.5) ? 20 : 2048)
  const builder = new FrameBuilder(Buffer.allocUnsafeSlow(MiB), 1)
  const at = builder.reserveData(RecordKind.write, 0, firstSeq * 512, lengthBytes)
  if (random.chance(0.5)) randomFillSync(builder.payload, at, lengthBytes)
  else builder.payload.fill(firstSeq, at, at + lengthBytes)
  return { builder, raw: Buffer.from(builder.payload.subarray(at, at + lengthBytes)) }
}

const check = ({ head, payload, lengthBytes, keepsSlab }: Sealed, builder: FrameBuilder, raw: Buffer): void => {
  const { header, stored } = parseFrame(Buffer.concat([head, payload]))
  expect(lengthBytes).toBe(head.length + payload.length)
  expect(decodeFramePayload(header, stored).equals(raw)).toBe(true)
  expect(keepsSlab).toBe(payload.buffer === builder.payload.buffer)
  expect(builder.payload.length).toBe(MiB)
}

/** Frames that are large enough for the thread, until it is started and answers. */
const warmUp = async (thread: SealingThread): Promise<void> => {
  for (let ready = false; !ready; ) {
    await new Promise((resolve) => setImmediate(resolve))
    const builder = new FrameBuilder(Buffer.allocUnsafeSlow(MiB), 1)
    randomFillSync(builder.payload, builder.reserveData(RecordKind.write, 0, 0, MiB), MiB)
    await new Promise<void>((resolve) => {
      let returned = false
      thread.seal(builder, { firstSeq: 1, epoch: 1, atUnixMs: 1, flags: 0 }, () => {
        ready = returned
        resolve()
      })
      returned = true
    })
  }
}

describe('sealing', () => {
  test('frames come back in the order they were given, each with its own content, whatever their sizes', async () => {
    const random = new Random(testSeed())
    process.stdout.write(`seed ${random.seed}\n`)
    await using thread = new SealingThread((why) => { throw new Error(why) })
    await warmUp(thread)
    for (const sealer of [thread, inlineSealer(adaptiveZstd())] satisfies FrameSealer[]) {
      const order: number[] = []
      await new Promise<void>((resolve) => {
        for (let seq = 1; seq <= 200; seq++) {
          const { builder, raw } = filled(random, seq)
          sealer.seal(builder, { firstSeq: seq, epoch: 3, atUnixMs: 1, flags: 0 }, (sealed) => {
            expect([sealed.firstSeq, sealed.lastSeq]).toEqual([seq, seq])
            check(sealed, builder, raw)
            order.push(seq)
            if (seq === 200) resolve()
          })
        }
      })
      expect(order).toEqual(Array.from({ length: 200 }, (_, at) => at + 1))
    }
  })

  test('now and then a large frame is no reason for a thread', async () => {
    const started: Worker[] = []
    await using thread = new SealingThread((why) => { throw new Error(why) }, (worker) => started.push(worker))
    let done = 0
    for (let seq = 1; seq <= 4; seq++) {
      const builder = new FrameBuilder(Buffer.allocUnsafeSlow(MiB), 1)
      builder.reserveData(RecordKind.write, 0, 0, MiB)
      thread.seal(builder, { firstSeq: seq, epoch: 1, atUnixMs: 1, flags: 0 }, () => done++)
    }
    expect([done, started.length]).toEqual([4, 0])
    await warmUp(thread)
    expect(started.length).toBe(1)
  })

  test('a thread that dies with frames in it is told once; the next large frame has a new one', async () => {
    const lost: string[] = []
    const started: Worker[] = []
    const told = Promise.withResolvers<void>()
    await using thread = new SealingThread((why) => {
      lost.push(why)
      told.resolve()
    }, (worker) => started.push(worker))
    await warmUp(thread)
    let done = 0
    for (let seq = 1; seq <= FRAMES; seq++) {
      const builder = new FrameBuilder(Buffer.allocUnsafeSlow(MiB), 1)
      randomFillSync(builder.payload, builder.reserveData(RecordKind.write, 0, 0, MiB), MiB)
      thread.seal(builder, { firstSeq: seq, epoch: 1, atUnixMs: 1, flags: 0 }, () => done++)
    }
    await started[0].terminate()
    await told.promise
    // What it had answered came; the rest never does.
    const answered = done
    expect(lost.length).toBe(1)
    expect(answered).toBeLessThan(FRAMES)
    await warmUp(thread)
    expect([started.length, done]).toEqual([2, answered])
  })

  test('disposed twice and in the middle of its work, it is gone and calls nobody', async () => {
    const started: Worker[] = []
    const thread = new SealingThread(() => { throw new Error('told of a loss') }, (worker) => started.push(worker))
    await warmUp(thread)
    const exited = once(started[0], 'exit')
    const { builder } = filled(new Random(3), 1)
    thread.seal(builder, { firstSeq: 1, epoch: 1, atUnixMs: 1, flags: 0 }, () => undefined)
    await Promise.all([thread[Symbol.asyncDispose](), thread[Symbol.asyncDispose]()])
    await exited
  })
})
