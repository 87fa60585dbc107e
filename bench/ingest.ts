import { randomBytes } from 'node:crypto'
import { mkdirSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { SegmentSealer } from '../agent/journal/index.ts'
import { tool } from '../test/lab/index.ts'
import { figureOf, type Bench, type BenchOptions, type Figure } from './figure.ts'
import { memoryImagePath } from './rig/disk-directory.ts'
import { RECORDS_PER_FRAME, buildFrames, feed, openFedStore } from './rig/fed-store.ts'

const NAME = 'ingest'
const MIB = 2 ** 20
/** What the store makes durable at once, at most. */
const COMMIT_MIB = 16

/** Seconds from the first frame accepted to the last one durable, in a new store. */
const ingestSeconds = async (directory: string, frames: readonly Buffer[], signal: AbortSignal): Promise<number> => {
  await using sealer = new SegmentSealer()
  await using store = await openFedStore(directory, sealer)
  const seconds = await feed(store, frames, signal)
  await store.sealingIdle()
  return seconds
}

const run = async ({ quick, say, diskDirectory, signal }: BenchOptions): Promise<Figure[]> => {
  const totalBytes = (quick ? 128 : 1024) * MIB
  const directory = join(diskDirectory, 'ingest')
  const inputPath = memoryImagePath('ingest')
  const frames = buildFrames(totalBytes)
  const bytes = frames.reduce((sum, frame) => sum + frame.length, 0)
  try {
    writeFileSync(inputPath, randomBytes(Math.min(totalBytes, 1024 * MIB)))
    const rounds: { ours: number; reference: number }[] = []
    for (let round = 0; round < (quick ? 1 : 5); round++) {
      mkdirSync(directory, { recursive: true })
      const ddStartedMs = performance.now()
      await tool('dd', [`if=${inputPath}`, `of=${directory}/dd.raw`, `bs=${COMMIT_MIB}M`, 'oflag=dsync'], { deadlineMs: 300_000, signal })
      const reference = statSync(inputPath).size / MIB / ((performance.now() - ddStartedMs) / 1000)
      rmSync(`${directory}/dd.raw`)
      const ours = bytes / MIB / (await ingestSeconds(join(directory, 'vm'), frames, signal))
      rmSync(directory, { recursive: true })
      rounds.push({ ours, reference })
      say(`${NAME} round ${round}: ours ${ours.toFixed(0)} MiB/s, dd ${reference.toFixed(0)}`)
    }
    const figure = figureOf(NAME, 'MiB/s', 'more is better', rounds, `dd bs=${COMMIT_MIB}M oflag=dsync on the same disk`)
    const recordsPerSec = (figure.value * MIB * RECORDS_PER_FRAME) / frames[0].length
    return [{ ...figure, ...(quick ? { reduced: true } : {}), note: `${Math.round(recordsPerSec)} records/s of 4 KiB; ${totalBytes / MIB} MiB` }]
  } finally {
    rmSync(inputPath, { force: true })
    rmSync(directory, { recursive: true, force: true })
  }
}

export const ingestBench: Bench = { names: [NAME], run }
