import { cpSync, rmSync } from 'node:fs'
import { SegmentSealer, VmStore } from '../../agent/journal/index.ts'
import { silentLogger } from '../../core/log/index.ts'

export type JournalReport = {
  durableSeq: number
  epoch: number
  frames: number
  /** Sequences that are missing, twice there or out of order, and whatever a scrub finds. Empty is as it should be. */
  problems: string[]
}

/**
 * Reads a VM's journal from end to end, as it lies on disk, while no agent runs: on a copy, because opening it cuts a torn tail.
 * The mirror disks are not copied.
 */
export const checkJournal = async (directory: string, vm: string, scratchDir: string): Promise<JournalReport> => {
  const copy = `${scratchDir}/journal-${vm}`
  cpSync(directory, copy, { recursive: true, filter: (path) => !path.startsWith(`${directory}/mirror/`) })
  try {
    await using sealer = new SegmentSealer()
    await using store = await VmStore.open({ directory: copy, vm, log: silentLogger, clock: { nowUnixMs: Date.now }, sealer })
    await store.sealingIdle()
    const report = await store.verify()
    const problems = [...report.damage, ...store.damage()].map(({ firstSeq, lastSeq, what }) => `${firstSeq}-${lastSeq}: ${what}`)
    let expectedSeq: number | undefined
    for (const { segmentNumber } of store.segments) {
      for await (const { header } of store.recordsOf(segmentNumber)) {
        if (expectedSeq !== undefined && header.firstSeq !== expectedSeq) problems.push(`a frame begins with ${header.firstSeq} where ${expectedSeq} should follow`)
        if (header.lastSeq - header.firstSeq + 1 !== header.recordCount) problems.push(`a frame of ${header.recordCount} records says ${header.firstSeq} to ${header.lastSeq}`)
        expectedSeq = header.lastSeq + 1
      }
    }
    if (expectedSeq !== undefined && expectedSeq !== store.durableSeq + 1) problems.push(`the journal ends with ${expectedSeq - 1}, the store says ${store.durableSeq}`)
    return { durableSeq: store.durableSeq, epoch: store.epoch, frames: report.frames, problems }
  } finally {
    rmSync(copy, { recursive: true, force: true })
  }
}
