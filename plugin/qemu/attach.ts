import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { Qmp } from '../../core/qmp/index.ts'
import { currentBitmap, planAttach } from './attach-plan.ts'
import type { AttachStep, AttachTarget } from './attach-plan.ts'
import { queryBlockState } from './block-state.ts'
import { readCounters } from './counters.ts'
import type { DiskCounters } from './counters.ts'
import { detachCapture } from './detach.ts'
import { requireVersion } from './disks.ts'
import type { QemuDisk } from './disks.ts'
import { waitForReady, waitForStandby } from './job.ts'
import { namesOf } from './names.ts'
import type { DiskNames } from './names.ts'

export type AttachOptions = AttachTarget & {
  /** For each step; a healthy QEMU takes a few ms. Default 5000. */
  stepDeadlineMs?: number
  /** When an attach fails: leave our bitmaps where they are. Default false. */
  keepBitmapsOnFailure?: boolean
  /** Told before each step. What it throws ends the attach there. */
  onStep?: (step: AttachStep, index: number) => void
  signal?: AbortSignal
}

export type AttachedDisk = {
  key: string
  names: DiskNames
  /** `existed`: it recorded before this attach began. */
  bitmap: { node: string; name: string; existed: boolean }
  /** The guest's counters right after READY of all disks. Under load the writes in flight at that moment count on one side only. */
  countersAtReady: DiskCounters
}

/**
 * Attaches capture to disks of a running VM, over one connection. The NBD server must have answered a handshake before: a
 * server that accepts and says nothing freezes the whole VM inside blockdev-add.
 * @throws CdpError CAPTURE_ATTACH (cause: the failed step; everything was undone, or context.undone is false and
 *   `repairHalfStates` has to run); CONFLICT (nothing was begun); QEMU_TOO_OLD.
 */
export const attachCapture = async (qmp: Qmp, disks: readonly QemuDisk[], options: AttachOptions): Promise<AttachedDisk[]> => {
  requireVersion(qmp)
  const state = await queryBlockState(qmp)
  const plan = planAttach(disks, state, options)
  const counters = await runSteps(qmp, disks, plan.steps, options)
  return disks.map((disk) => {
    const countersAtReady = counters.get(disk.key)
    if (!countersAtReady) throw new CdpError('QMP_PROTOCOL', `QEMU shows no counters of ${disk.key}`)
    return { key: disk.key, names: namesOf(disk.key), bitmap: { node: disk.bitmapNode, name: plan.bitmaps.get(disk.key) ?? '', existed: currentBitmap(disk, state).exists }, countersAtReady }
  })
}

const runSteps = async (qmp: Qmp, disks: readonly QemuDisk[], steps: readonly AttachStep[], options: AttachOptions): Promise<Map<string, DiskCounters>> => {
  let failed: AttachStep | undefined
  try {
    const sinceMark = qmp.eventMark
    for (const [index, step] of steps.entries()) {
      failed = step
      options.onStep?.(step, index)
      await runStep(qmp, step, sinceMark, options)
    }
    return await readCounters(qmp)
  } catch (error) {
    const undone = await undo(qmp, disks, options)
    const what = failed ? `${failed.is === 'command' ? failed.command : failed.is}${failed.key === '' ? '' : ` (${failed.key})`}` : 'the start'
    throw new CdpError('CAPTURE_ATTACH', `Capture could not be attached: ${what}: ${errorMessage(error)}`, {
      cause: error, context: { step: what, undone }, ...(undone ? {} : { hint: 'Part of it is still in QEMU: it is taken away with the next connection to the VM.' }) })
  }
}

const runStep = (qmp: Qmp, step: AttachStep, sinceMark: number, options: AttachOptions): Promise<unknown> => {
  const wait = { deadlineMs: options.stepDeadlineMs ?? 5000, sinceMark, ...(options.signal ? { signal: options.signal } : {}) }
  switch (step.is) {
    case 'command': return qmp.execute(step.command, step.args, wait)
    case 'wait-ready': return waitForReady(qmp, step.job, wait)
    case 'wait-standby': return waitForStandby(qmp, step.job, wait)
  }
}

const undo = async (qmp: Qmp, disks: readonly QemuDisk[], options: AttachOptions): Promise<boolean> => {
  try {
    await detachCapture(qmp, { keys: disks.map((disk) => disk.key), keepBitmaps: options.keepBitmapsOnFailure ?? false })
    return true
  } catch (error) {
    if (error instanceof CdpError) return false
    throw error
  }
}
