import { mkdtemp, rm } from 'node:fs/promises'
import { expect, test } from '@jest/globals'
import { FilePool, PageCache, mergeVm } from '../../agent/index/index.ts'
import { FrameCache, ReadGate, RecoveryPoint } from '../../agent/recovery/index.ts'
import { adaptiveZstd } from '../../core/record/index.ts'
import { Random, testSeed } from '../kit/random.ts'
import { RandomHistory } from '../kit/random-history.ts'

const ROUNDS = process.env.CDP_ALL === undefined ? 8 : 200

const within = async (work: (directory: string) => Promise<void>): Promise<void> => {
  const directory = await mkdtemp('/tmp/cdp-pt-')
  try {
    await work(directory)
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
}

test('a point reads exactly mirror plus records up to its sequence, whatever was sealed, merged or evicted', async () => {
  const seed = testSeed()
  console.log(`seed ${seed}`)
  for (let round = 0; round < ROUNDS; round++) {
    const random = new Random(seed + round)
    await within(async (directory) => {
      const fanout = random.int(2, 6)
      using history = new RandomHistory(directory, random, { compress: random.chance(0.5) ? adaptiveZstd() : undefined })
      for (let step = 0; step < 6; step++) {
        history.grow(random.int(20, 150))
        if (random.chance(0.7)) history.writer.sealAll()
        if (random.chance(0.5)) await mergeVm(directory, fanout)
        const pageCacheBytes = random.chance(0.5) ? 4096 : 1 << 20
        const frameCacheBytes = random.chance(0.5) ? 1 : 1 << 22
        await using files = new FilePool(random.int(1, 20))
        const shared = { files, pages: new PageCache(pageCacheBytes), frames: new FrameCache(frameCacheBytes), gate: new ReadGate(4) }
        for (let points = 0; points < 3; points++) {
          const seq = random.int(0, history.writer.lastSeq + 1)
          await using point = await RecoveryPoint.open({ ...shared, vmDirectory: directory, seq })
          const reads: Promise<void>[] = []
          for (const disk of history.disks) {
            const model = history.modelAt(seq, disk.disk)
            reads.push((async () => {
              const whole = Buffer.concat(await point.read(disk.disk, 0, disk.sizeBytes))
              if (!whole.equals(model)) throw new Error(`round ${round} seq ${seq} disk ${disk.disk}: differs from byte ${whole.findIndex((byte, at) => byte !== model[at])}`)
            })())
            for (let n = 0; n < 10; n++) {
              const offset = random.int(0, disk.sizeBytes - 1)
              const length = random.int(1, Math.min(9000, disk.sizeBytes - offset) + 1)
              reads.push(point.read(disk.disk, offset, length).then((parts) => {
                if (!Buffer.concat(parts).equals(model.subarray(offset, offset + length))) throw new Error(`round ${round} seq ${seq} disk ${disk.disk}: ${length} bytes at ${offset} differ`)
              }))
            }
            if (points === 0) reads.push(point.blockStatus(disk.disk, 0, disk.sizeBytes).then((extents) => {
              let at = 0
              for (const extent of extents) {
                if (extent.isHole && model.subarray(at, at + extent.lengthBytes).some((byte) => byte !== 0)) throw new Error(`round ${round} seq ${seq}: a hole at ${at} holds data`)
                at += extent.lengthBytes
              }
              expect(at).toBeLessThanOrEqual(disk.sizeBytes)
              expect(at).toBeGreaterThan(0)
            }))
          }
          await Promise.all(reads)
        }
      }
    })
  }
}, 600_000)
