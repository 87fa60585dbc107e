import { randomBytes } from 'node:crypto'
import { mkdirSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { SegmentSealer, VmStore } from '../agent/journal/index.ts'
import { silentLogger } from '../core/log/index.ts'
import { FLAG_DIRECT, FrameBuilder, RecordKind } from '../core/record/index.ts'
import { tool } from '../test/lab/index.ts'
import { figureOf, type Bench, type BenchOptions, type Figure } from './figure.ts'
import { memoryImagePath } from './rig/disk-directory.ts'

const NAME = 'ingest'
const MIB = 2 ** 20
const WRITE_BYTES = 4096
/** What capture puts into a frame. */
const RECORDS_PER_FRAME = 64
const DISK_BYTES = 1024 * MIB
/** The store is fed as the stream does it: it stops above the first, goes on below the second. */
const PAUSE_BYTES = 32 * MIB
const RESUME_BYTES = 16 * MIB
/** What the store makes durable at once, at most. */
const COMMIT_MIB = 16

/** Frames of 4 KiB writes at random places, in order from sequence 2 on; data that do not compress. */
const buildFrames = (totalBytes: number): Buffer[] => {
  const data = randomBytes(RECORDS_PER_FRAME * WRITE_BYTES)
  const frames: Buffer[] = []
  for (let firstSeq = 2; (firstSeq - 2) * WRITE_BYTES < totalBytes; firstSeq += RECORDS_PER_FRAME) {
    const builder = new FrameBuilder(data, RECORDS_PER_FRAME)
    for (let n = 0; n < RECORDS_PER_FRAME; n++) {
      const block = ((firstSeq + n) * 7919) % (DISK_BYTES / WRITE_BYTES)
      builder.reserveData(RecordKind.write, 0, block * WRITE_BYTES, WRITE_BYTES)
    }
    const { head, payload } = builder.seal({ firstSeq, epoch: 1, atUnixMs: 1, flags: 0 })
    frames.push(Buffer.concat([head, payload]))
  }
  return frames
}

/** The frame that ends the sync of a blank disk. */
const syncEnd = (): Buffer => {
  const builder = new FrameBuilder(Buffer.alloc(4096), 1)
  builder.addJson(RecordKind.syncEnd, 0, JSON.stringify({ kind: 'initial' }))
  const { head, payload } = builder.seal({ firstSeq: 1, epoch: 1, atUnixMs: 1, flags: FLAG_DIRECT })
  return Buffer.concat([head, payload])
}

/** Seconds from the first frame accepted to the last one durable. */
const ingestSeconds = async (directory: string, frames: readonly Buffer[], signal: AbortSignal): Promise<number> => {
  await using sealer = new SegmentSealer()
  await using store = await VmStore.open({ directory, vm: '101', log: silentLogger, clock: { nowUnixMs: Date.now }, sealer })
  await store.beginEpoch([{ disk: 0, key: 'scsi0', sizeBytes: DISK_BYTES }])
  store.accept(syncEnd())
  await store.flush()
  let wake: (() => void) | undefined
  store.onDurable = () => {
    if (store.queuedBytes < RESUME_BYTES) wake?.()
  }
  store.onStopped = () => wake?.()
  const startedMs = performance.now()
  for (const frame of frames) {
    store.accept(frame)
    if (store.queuedBytes <= PAUSE_BYTES) continue
    signal.throwIfAborted()
    await new Promise<void>((resolve) => (wake = resolve))
  }
  await store.flush()
  const seconds = (performance.now() - startedMs) / 1000
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
