import { randomBytes } from 'node:crypto'
import { mkdir, mkdtemp, open, readdir, rm } from 'node:fs/promises'
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { FrameBuilder, RecordKind, parseFrame } from '../../core/record/index.ts'
import { SlabPool, SpillFile, SpillingQueue } from '../../plugin/buffer/index.ts'
import type { QueuedFrame, Spill } from '../../plugin/buffer/index.ts'
import { Random, testSeed } from '../kit/random.ts'
import { fillUp, smallFileSystem } from '../kit/small-file-system.ts'

const pool = new SlabPool(64 * 1024, 1024 * 1024)
let dir = ''
beforeEach(async () => {
  dir = await mkdtemp('/tmp/cdp-')
})
afterEach(() => rm(dir, { recursive: true, force: true }))

/** A frame of one write whose bytes say its sequence. */
const frame = (seq: number, lengthBytes: number): QueuedFrame => {
  const slab = pool.take()
  const builder = new FrameBuilder(slab, 1)
  const at = builder.reserveData(RecordKind.write, 0, 0, lengthBytes)
  builder.payload.fill(seq & 255, at, at + lengthBytes)
  const { keepsSlab, ...sealed } = builder.seal({ firstSeq: seq, epoch: 1, atUnixMs: 1, flags: 0 })
  return keepsSlab ? { ...sealed, slab, pool } : sealed
}

const checkFrame = (sent: QueuedFrame, seq: number): void => {
  const { header, stored } = parseFrame(Buffer.concat([sent.head, sent.payload]))
  if (header.firstSeq !== seq || !stored.every((byte) => byte === (seq & 255))) throw new Error(`frame ${header.firstSeq} instead of ${seq}`)
}

const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))

describe('a queue that overflows into files', () => {
  test('whatever the link and the files do, the sender sees every frame once, in order and whole, and memory stays bounded', async () => {
    const random = new Random(testSeed())
    process.stdout.write(`seed ${random.seed}\n`)
    await using spill = new SpillFile({ directory: `${dir}/vm`, limitBytes: 1e9, reserveBytes: 0, segmentBytes: 600_000 })
    await spill.prepare()
    const failed: string[] = []
    const startBytes = 256 * 1024
    const queue = new SpillingQueue({ spill, startBytes, onFailed: (why) => failed.push(why) })
    let newest = 0
    let sent = 0
    let durable = 0
    let spilledOnce = 0
    let joined = 0
    let wasSpilling = false
    const send = (most: number): void => {
      for (let n = 0; n < most; n++) {
        const next = queue.next()
        if (next === undefined) return
        checkFrame(next, ++sent)
      }
    }
    let linkUp = false
    while (joined < 5) {
      // An outage lasts until a few files are full, and the link holds until all is in memory again, and a little longer.
      if (!linkUp && queue.spilledBytes > 1_500_000) linkUp = true
      else if (linkUp && !queue.spilling && random.chance(0.02)) linkUp = false
      // With the link up the guest is slower than files and link together: these rounds are much faster than a disk.
      if (random.chance(!linkUp ? 0.8 : queue.spilling ? 0.002 : 0.3)) queue.push(frame(++newest, 512 * random.int(1, 100)))
      if (linkUp) {
        send(random.int(0, 10))
        if (random.chance(0.7)) queue.release((durable = random.chance(0.5) ? sent : random.int(durable, sent + 1)))
        if (random.chance(0.02)) {
          queue.rewind(durable)
          sent = durable
        }
      }
      if (random.chance(0.5)) await turn()
      spilledOnce = Math.max(spilledOnce, queue.spilledBytes)
      if (wasSpilling && !queue.spilling) joined++
      wasSpilling = queue.spilling
      // Without a link, memory holds what it held when the overflow began, and what the disk has not taken yet.
      while (!linkUp && queue.spilling && queue.heldBytes > startBytes * 5) await turn()
    }
    while (durable < newest) {
      send(10)
      queue.release((durable = sent))
      await turn()
    }
    expect(failed).toEqual([])
    expect([sent, queue.isEmpty, queue.heldBytes, spill.bytes]).toEqual([newest, true, 0, 0])
    expect(spilledOnce).toBeGreaterThan(600_000)
    expect(await readdir(`${dir}/vm`)).toEqual([])
  })

  test('a new attach forgets what is in the files, also while one of them is being written', async () => {
    await using spill = new SpillFile({ directory: `${dir}/vm`, limitBytes: 1e9, reserveBytes: 0 })
    await spill.prepare()
    const queue = new SpillingQueue({ spill, startBytes: 64 * 1024, onFailed: (why) => { throw new Error(why) } })
    for (let seq = 1; seq <= 50; seq++) queue.push(frame(seq, 32 * 1024))
    expect(queue.spilling).toBe(true)
    queue.clear(1000)
    expect([queue.isEmpty, queue.spilledBytes, queue.heldBytes]).toEqual([true, 0, 0])
    for (let seq = 1001; seq <= 1100; seq++) queue.push(frame(seq, 32 * 1024))
    for (let seq = 1001; seq <= 1100; ) {
      const next = queue.next()
      if (next === undefined) await turn()
      else {
        checkFrame(next, seq)
        queue.release(seq++)
      }
    }
    expect(queue.isEmpty).toBe(true)
  })

  test('full files take no more and say why; what is in them goes on, and then they take again', async () => {
    await using spill = new SpillFile({ directory: `${dir}/vm`, limitBytes: 1_000_000, reserveBytes: 0 })
    await spill.prepare()
    const queue = new SpillingQueue({ spill, startBytes: 64 * 1024, onFailed: (why) => { throw new Error(why) } })
    let newest = 0
    while (queue.whyFull === undefined) {
      queue.push(frame(++newest, 32 * 1024))
      await turn()
    }
    expect(queue.whyFull).toContain('limit of 1000000 bytes')
    expect(spill.bytes).toBeLessThanOrEqual(1_000_000)
    queue.push(frame(++newest, 512))
    for (let seq = 1; seq <= newest; ) {
      const next = queue.next()
      if (next === undefined) await turn()
      else {
        checkFrame(next, seq)
        queue.release(seq++)
      }
    }
    expect([queue.isEmpty, queue.whyFull]).toEqual([true, undefined])
  })

  test('the reserve of the file system is kept', async () => {
    await using spill = new SpillFile({ directory: `${dir}/vm`, limitBytes: 1e12, reserveBytes: 1e18 })
    await spill.prepare()
    expect(await spill.append([frame(1, 512)])).toMatchObject({ is: 'full', why: expect.stringContaining('must keep') })
    expect(await readdir(`${dir}/vm`)).toEqual([])
  })

  test('a disk that somebody else filled takes no more; what is in the files stays, and when there is room again they take again', async () => {
    await using small = await smallFileSystem(8)
    await using spill = new SpillFile({ directory: `${small.path}/vm`, limitBytes: 1e9, reserveBytes: 0, segmentBytes: 200_000 })
    await spill.prepare()
    const append = (...seqs: number[]) => spill.append(seqs.map((seq) => frame(seq, 32_768)))
    expect(await append(1, 2)).toEqual({ is: 'written' })
    const makeRoom = await fillUp(small.path, 0)
    expect(await append(3, 4)).toEqual({ is: 'full', why: `the file system of ${small.path}/vm is full` })
    await makeRoom()
    expect(await append(3, 4, 5)).toEqual({ is: 'written' })
    const taken: number[] = []
    for (let frames = await spill.take(); frames.length > 0; frames = await spill.take()) {
      for (const one of frames) {
        checkFrame(one, one.firstSeq)
        taken.push(one.firstSeq)
      }
    }
    expect(taken).toEqual([1, 2, 3, 4, 5])
  })

  test('a frame that the disk has changed is found when it comes back; nothing behind it is sent', async () => {
    const told = Promise.withResolvers<string>()
    await using spill = new SpillFile({ directory: `${dir}/vm`, limitBytes: 1e9, reserveBytes: 0 })
    await spill.prepare()
    const queue = new SpillingQueue({ spill, startBytes: 64 * 1024, onFailed: told.resolve })
    let newest = 0
    while (spill.bytes < 300_000) {
      queue.push(frame(++newest, 32 * 1024))
      await turn()
    }
    const [name] = await readdir(`${dir}/vm`)
    {
      // In place: the file is in use.
      await using file = await open(`${dir}/vm/${name}`, 'r+')
      const byte = Buffer.alloc(1)
      await file.read(byte, 0, 1, 100_000)
      await file.write(Buffer.of(byte[0] ^ 1), 0, 1, 100_000)
    }
    let sent = 0
    for (let next = queue.next(); next !== undefined; next = queue.next()) queue.release((sent = next.lastSeq))
    expect(await told.promise).toContain('checksum')
    expect(sent).toBeLessThan(newest)
    queue.push(frame(++newest, 512))
    expect(queue.next()).toBeUndefined()
    queue.clear(newest)
    queue.push(frame(newest + 1, 512))
    expect(queue.next()?.firstSeq).toBe(newest + 1)
  })

  test('storage that hangs: one operation is under way, no more, and it is told; when it comes back all is well again', async () => {
    const gate = Promise.withResolvers<void>()
    await using real = new SpillFile({ directory: `${dir}/vm`, limitBytes: 1e9, reserveBytes: 0 })
    await real.prepare()
    let underWay = 0
    let most = 0
    let hang = true
    const spill: Spill = {
      get bytes() { return real.bytes },
      append: async (frames) => {
        most = Math.max(most, ++underWay)
        if (hang) await gate.promise
        underWay--
        return real.append(frames)
      },
      take: () => real.take(),
      clear: () => real.clear(),
    }
    const queue = new SpillingQueue({ spill, startBytes: 64 * 1024, onFailed: (why) => { throw new Error(why) } })
    for (let seq = 1; seq <= 100; seq++) {
      queue.push(frame(seq, 32 * 1024))
      await turn()
    }
    expect([most, queue.spilledBytes]).toEqual([1, 0])
    expect(queue.heldBytes).toBeGreaterThan(100 * 32 * 1024)
    hang = false
    gate.resolve()
    for (let seq = 1; seq <= 100; ) {
      const next = queue.next()
      if (next === undefined) await turn()
      else {
        checkFrame(next, seq)
        queue.release(seq++)
      }
    }
  })

  test('an operation that misses its deadline is an error, and the next one is refused until it has come back', async () => {
    await mkdir(`${dir}/vm`)
    await using late = new SpillFile({ directory: `${dir}/vm`, limitBytes: 1e10, reserveBytes: 0, deadlineMs: 1 })
    // 400 MiB do not get into a file within a millisecond.
    const payload = randomBytes(4 * 1024 * 1024)
    const head = Buffer.alloc(64)
    const many = Array.from({ length: 100 }, (_, at) => ({ firstSeq: at + 1, lastSeq: at + 1, head, payload, lengthBytes: 64 + payload.length }))
    await expect(late.append(many)).rejects.toMatchObject({ code: 'TIMEOUT' })
    await expect(late.take()).rejects.toMatchObject({ code: 'IO', message: expect.stringContaining('hangs') })
    const again = async (): Promise<unknown> => {
      for (;;) {
        try {
          return await late.append([])
        } catch (error) {
          if (!(Error.isError(error) && /hangs|longer/.test(error.message))) throw error
          await turn()
        }
      }
    }
    expect(await again()).toEqual({ is: 'written' })
  })
})
