import { randomBytes } from 'node:crypto'
import { VmStore } from '../../agent/journal/index.ts'
import type { SegmentSealer } from '../../agent/journal/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { FLAG_DIRECT, FrameBuilder, RecordKind } from '../../core/record/index.ts'

const WRITE_BYTES = 4096
/** What capture puts into a frame. */
export const RECORDS_PER_FRAME = 64
const DISK_BYTES = 1024 * 2 ** 20
/** A store is fed as the stream does it: it stops above the first, goes on below the second. */
const PAUSE_BYTES = 32 * 2 ** 20
const RESUME_BYTES = 16 * 2 ** 20

/** Frames of 4 KiB writes at random places, none written twice, in order from sequence 2 on; data that do not compress. */
export const buildFrames = (totalBytes: number): Buffer[] => {
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

/** The store of a VM with one blank disk, in step. */
export const openFedStore = async (directory: string, sealer: SegmentSealer): Promise<VmStore> => {
  const store = await VmStore.open({ directory, vm: '101', log: silentLogger, clock: { nowUnixMs: Date.now }, sealer })
  await store.beginEpoch([{ disk: 0, key: 'scsi0', sizeBytes: DISK_BYTES }])
  store.accept(syncEnd())
  await store.flush()
  return store
}

/** Seconds from the first frame accepted to the last one durable. */
export const feed = async (store: VmStore, frames: readonly Buffer[], signal: AbortSignal): Promise<number> => {
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
  return (performance.now() - startedMs) / 1000
}
