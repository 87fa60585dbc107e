import { expect, test } from '@jest/globals'
import { FLAG_DIRECT, MAX_FRAME_PAYLOAD_BYTES, RecordKind, adaptiveZstd, decodeFramePayload, hasData, hasJson, parseFrame, recordJson } from '../../core/record/index.ts'
import { FrameQueue, SlabPool } from '../../plugin/buffer/index.ts'
import { inlineSealer } from '../../plugin/capture/frame-sealer.ts'
import { Recorder, isLargeWrite } from '../../plugin/capture/recorder.ts'
import { Random, testSeed } from '../kit/random.ts'

type Expected = { kind: number; disk: number; offsetBytes: number; data?: Buffer; lengthBytes?: number; json?: unknown; direct: boolean }

const LARGE_BYTES = 1024 * 1024

/** A pool that writes over every slab that comes back: a frame that still needs it is caught. */
class PoisonPool extends SlabPool {
  taken = 0
  override take(): Buffer {
    this.taken++
    return super.take()
  }
  override give(slab: Buffer): void {
    slab.fill(0xdd)
    this.taken--
    super.give(slab)
  }
}

const fill = (data: Buffer, random: Random): void => {
  if (random.chance(0.5)) data.fill(random.int(0, 256))
  else for (let at = 0; at + 4 <= data.length; at += 4) data.writeUInt32LE(random.u32(), at)
}

const runHistory = async (seed: number): Promise<{ records: number; frames: number }> => {
  const random = new Random(seed)
  const queue = new FrameQueue()
  const smallSlabs = new PoisonPool(256 * 1024, 4 * 256 * 1024)
  const largeSlabs = new PoisonPool(LARGE_BYTES, 4 * LARGE_BYTES)
  const recorder = new Recorder({ queue, smallSlabs, largeSlabs, sealer: inlineSealer(random.chance(0.5) ? adaptiveZstd() : () => undefined), nowUnixMs: () => 1, lingerMs: random.int(0, 3) })
  const begunAt = random.int(0, 1000)
  recorder.begin(7, begunAt, random.chance(0.5))
  const expected: Expected[] = []
  recorder.mark(RecordKind.epoch, 0, { reason: 'x' })
  queue.onPush = () => undefined
  const chunk = Buffer.alloc(LARGE_BYTES + 512)
  let seen = 0
  let durable = begunAt
  let frames = 0
  let firstFlags: number | undefined

  const check = (): void => {
    for (let frame = queue.next(); frame !== undefined; frame = queue.next()) {
      frames++
      const { header, table, stored } = parseFrame(Buffer.concat([frame.head, frame.payload]))
      expect([header.firstSeq, header.lastSeq, header.epoch]).toEqual([begunAt + seen + 1, frame.lastSeq, 7])
      expect(header.payloadRawBytes).toBeLessThanOrEqual(MAX_FRAME_PAYLOAD_BYTES)
      const raw = decodeFramePayload(header, stored)
      firstFlags ??= header.flags
      for (let index = 0; index < table.count; index++) {
        const one = seen++ === 0 ? undefined : expected[seen - 2]
        if (one === undefined) continue
        const got = [table.kind(index), table.disk(index), table.offsetBytes(index)]
        if (got.join() !== [one.kind, one.disk, one.offsetBytes].join()) throw new Error(`record ${seen}: ${got.join()} instead of ${one.kind},${one.disk},${one.offsetBytes}`)
        if (header.flags !== (one.direct ? FLAG_DIRECT : 0)) throw new Error(`record ${seen}: flags ${header.flags}`)
        if (hasJson(one.kind)) expect(recordJson(table, index, raw)).toEqual(one.json)
        else if (!hasData(one.kind)) expect(table.lengthBytes(index)).toBe(one.lengthBytes)
        else if (one.data?.equals(raw.subarray(table.payloadOffset(index), table.payloadOffset(index) + table.lengthBytes(index))) !== true) throw new Error(`record ${seen}: other data`)
      }
      if (random.chance(0.7)) queue.release((durable = frame.lastSeq))
    }
  }

  // The mode is whatever begin was told; the first frame says which.
  recorder.flush()
  check()
  let direct = firstFlags === FLAG_DIRECT
  for (let n = random.int(50, 400); n > 0; n--) {
    const disk = random.int(0, 4)
    const offsetBytes = 512 * random.int(0, 1 << 20)
    const what = random.int(0, 100)
    if (what < 50) {
      const lengthBytes = 512 * (random.chance(0.1) ? random.int(1, 2049) : random.int(1, 64))
      const start = random.int(0, 512)
      const data = chunk.subarray(start, start + lengthBytes)
      fill(data, random)
      const kind = random.chance(0.8) ? RecordKind.write : RecordKind.sync
      expected.push({ kind, disk, offsetBytes, data: Buffer.from(data), direct })
      if (isLargeWrite(lengthBytes)) {
        const slab = largeSlabs.take()
        data.copy(slab)
        recorder.takeLarge(kind, disk, offsetBytes, lengthBytes, slab)
      } else if (kind === RecordKind.write) recorder.write(disk, offsetBytes, chunk, start, start + lengthBytes)
      else recorder.sync(disk, offsetBytes, chunk, start, start + lengthBytes)
      chunk.fill(0xcc, start, start + lengthBytes)
    } else if (what < 75) {
      const kind = [RecordKind.zero, RecordKind.discard, RecordKind.syncZero][random.int(0, 3)]
      expected.push({ kind, disk, offsetBytes, lengthBytes: 512 * random.int(1, 1000), direct })
      recorder.range(kind, disk, offsetBytes, expected.at(-1)?.lengthBytes ?? 0)
    } else if (what < 83) {
      const json = { id: n, text: 'ä'.repeat(random.int(0, 300)) }
      expected.push({ kind: RecordKind.checkpoint, disk: 0xffff, offsetBytes: n, json, direct })
      recorder.mark(RecordKind.checkpoint, n, json)
    } else if (what < 88) recorder.flush()
    else if (what < 93) await new Promise((resolve) => setImmediate(resolve))
    else if (what < 95) await new Promise((resolve) => setTimeout(resolve, 2))
    else if (what < 96 && direct) {
      recorder.endDirect()
      direct = false
    } else check()
    if (recorder.lastSeq !== begunAt + 1 + expected.length) throw new Error('a record has no sequence of its own')
  }
  recorder.flush()
  check()
  expect(seen).toBe(expected.length + 1)
  expect(recorder.unsealedBytes).toBe(0)
  queue.release(recorder.lastSeq)
  expect(queue.heldBytes).toBe(0)
  expect(durable).toBeLessThanOrEqual(recorder.lastSeq)
  // No slab is lost: what is still out belongs to the open builder and its spares.
  expect(largeSlabs.taken).toBe(0)
  expect(smallSlabs.taken).toBeLessThanOrEqual(9)
  recorder.dispose()
  return { records: expected.length, frames }
}

test('whatever is recorded, large, small, ranges, marks, flushed or left to timers, comes out once, in order, with its data', async () => {
  const seed = testSeed()
  process.stdout.write(`seed ${seed}\n`)
  let frames = 0
  for (let run = 0; run < 12; run++) frames += (await runHistory(seed + run)).frames
  expect(frames).toBeGreaterThan(50)
})

test('a mark that no frame has room for is refused, and leaves no trace', () => {
  const queue = new FrameQueue()
  const recorder = new Recorder({ queue, smallSlabs: new SlabPool(4096, 4096), largeSlabs: new SlabPool(8192, 8192), sealer: inlineSealer(() => undefined), nowUnixMs: () => 1, lingerMs: 1000 })
  recorder.begin(1, 0, false)
  recorder.range(RecordKind.zero, 0, 0, 512)
  expect(() => recorder.mark(RecordKind.epoch, 0, { config: 'x'.repeat(5000) })).toThrow(expect.objectContaining({ code: 'BAD_INPUT' }))
  recorder.range(RecordKind.zero, 0, 512, 512)
  recorder.flush()
  const frame = queue.next()
  expect(parseFrame(Buffer.concat([frame?.head ?? Buffer.alloc(0), frame?.payload ?? Buffer.alloc(0)])).header).toMatchObject({ firstSeq: 1, lastSeq: 2, payloadRawBytes: 0 })
  recorder.dispose()
})

test('what was not sealed is dropped by the next attach, and nothing comes after dispose', async () => {
  const queue = new FrameQueue()
  const recorder = new Recorder({ queue, smallSlabs: new SlabPool(4096, 4096), largeSlabs: new SlabPool(8192, 8192), sealer: inlineSealer(() => undefined), nowUnixMs: () => 1, lingerMs: 1 })
  recorder.begin(1, 0, false)
  recorder.range(RecordKind.zero, 0, 0, 512)
  recorder.takeLarge(RecordKind.write, 0, 0, 8192, Buffer.alloc(8192))
  recorder.begin(2, 100, true)
  recorder.range(RecordKind.zero, 0, 4096, 512)
  recorder.flush()
  expect(queue.length).toBe(1)
  expect(parseFrame(queue.next()?.head ?? Buffer.alloc(0)).header).toMatchObject({ firstSeq: 101, epoch: 2, flags: FLAG_DIRECT })
  recorder.range(RecordKind.zero, 0, 0, 512)
  recorder.dispose()
  await new Promise((resolve) => setTimeout(resolve, 5))
  expect(queue.length).toBe(1)
})
