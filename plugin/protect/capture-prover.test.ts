import { describe, expect, test } from '@jest/globals'
import type { CaptureWorker } from '../capture/index.ts'
import type { DiskCounters, VmLook } from '../qemu/index.ts'
import { CaptureProver } from './capture-prover.ts'

const quiet: DiskCounters = {
  key: 'scsi0', wrBytes: 0, wrOperations: 0, unmapBytes: 0, unmapOperations: 0, failedWrOperations: 0, failedUnmapOperations: 0, job: { status: 'ready', ready: true, paused: false, failed: false }, onPath: true,
}

/** Captured bytes are what the test says they are. */
const proverOf = (captured: () => number): CaptureProver => {
  const worker = { ask: async (name: string) => (name === 'captured' ? { seq: 1, bytes: { scsi0: captured() } } : {}) } as unknown as Pick<CaptureWorker, 'ask'>
  return new CaptureProver({ worker, disks: [{ disk: 0, key: 'scsi0', sizeBytes: 1 << 20 }], nowUnixMs: () => 1 })
}
const look = (change: Partial<DiskCounters> = {}): VmLook => ({ counters: new Map([['scsi0', { ...quiet, ...change }]]), sizes: new Map([['scsi0', 1 << 20]]), drained: true })

describe('since QEMU began', () => {
  test.each<[string, number, number, Partial<DiskCounters>, boolean]>([
    ['nothing was written', 0, 0, {}, true],
    ['all that was written was captured, by a worker that had captured for an earlier QEMU', 7_000, 4_096, { wrBytes: 4_096 }, true],
    ['a write came before the attach', 7_000, 0, { wrBytes: 4_096 }, false],
    ['one came before it, one after', 7_000, 4_096, { wrBytes: 8_192 }, false],
    ['somebody else wrote through our node', 7_000, 4_096, {}, false],
    ['the guest trimmed', 0, 0, { unmapBytes: 512 }, false],
    ['a write failed', 0, 0, { failedWrOperations: 1 }, false],
    ['a trim failed', 0, 0, { failedUnmapOperations: 1 }, false],
  ])('%s', async (_what, before, since, counters, complete) => {
    const prover = proverOf(() => before + since)
    expect(prover.missedSinceStart({ scsi0: before })).toBeDefined()
    await prover.check(async () => look(counters), () => undefined)
    expect(prover.missedSinceStart({ scsi0: before }) === undefined).toBe(complete)
    expect(prover.missedSinceStart({})).toBeDefined()
  })

  test('a guest that writes while it is looked at is not believed until a look finds it quiet', async () => {
    let captured = 0
    const prover = proverOf(() => captured)
    await prover.check(async () => {
      captured = 4_096
      return look({ wrBytes: 4_096 })
    }, () => undefined)
    expect(prover.missedSinceStart({ scsi0: 0 })).toMatch(/scsi0/)
    await prover.check(async () => look({ wrBytes: 4_096 }), () => undefined)
    expect(prover.missedSinceStart({ scsi0: 0 })).toBeUndefined()
  })

  test('a look that was not drained proves nothing', async () => {
    const prover = proverOf(() => 0)
    await prover.check(async () => ({ ...look(), drained: false }), () => undefined)
    expect(prover.missedSinceStart({ scsi0: 0 })).toBeDefined()
  })
})

describe('the last look is a doubt', () => {
  test.each<[string, VmLook, RegExp | undefined]>([
    ['unless the job was ready and all is captured', look(), undefined],
    ['if the job was not ready', look({ job: { status: 'running', ready: false, paused: false, failed: false } }), /not ready/],
    ['if there is no job', look({ job: undefined, onPath: false }), /do not pass capture/],
    ['if a disk came', { ...look(), sizes: new Map([['scsi0', 1 << 20], ['scsi1', 1]]) }, /scsi1 added/],
  ])('%s', async (_what, seen, doubt) => {
    const prover = proverOf(() => 0)
    expect(prover.doubt(1e9)).toMatch(/never/)
    await prover.check(async () => seen, () => undefined)
    const found = prover.doubt(1e9)
    if (doubt === undefined) expect(found).toBeUndefined()
    else expect(found).toMatch(doubt)
    expect(prover.doubt(-1)).toBeDefined()
  })
})
