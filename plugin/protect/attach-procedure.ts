import type { Logger } from '../../core/log/index.ts'
import { checkHandshake } from '../../core/nbd/index.ts'
import { withQmp } from '../../core/qmp/index.ts'
import type { DiskEntry, SyncKind } from '../../core/record/index.ts'
import type { Welcome } from '../../core/stream/index.ts'
import type { CaptureWorker } from '../capture/index.ts'
import { attachCapture, closeReadExport, detachCapture, discoverDisks, dropRotated, openReadExport, readCounters, repairHalfStates, rotateBitmaps } from '../qemu/index.ts'
import type { AttachedDisk, DiskCounters, QemuDisk } from '../qemu/index.ts'
import type { RunningVm } from './vm-files.ts'
import type { VmMemory, VmMemoryFile } from './vm-memory.ts'

const QMP_DEADLINE_MS = 10_000
const HANDSHAKE_DEADLINE_MS = 2_000

/** How a VM that was just attached comes in step with the agent. */
export type SyncPlan = { kind: SyncKind; why: string; fromBitmaps: boolean; fromBytes: (disk: number) => number; wholeAbove: boolean }

/** Decides the kind of sync from what the agent holds and what QEMU's bitmaps prove. Pure. */
export const planSync = (welcome: Welcome & { agentLostData?: boolean }, memory: VmMemory | undefined, bitmapsWereThere: boolean, why: string): SyncPlan => {
  const copied = (disk: number): number => welcome.syncProgress[String(disk)] ?? 0
  if (!welcome.baseComplete) {
    if (memory?.bitmaps === 'copying' && bitmapsWereThere) return { kind: 'initial', why: `first copy goes on: ${why}`, fromBitmaps: true, fromBytes: copied, wholeAbove: true }
    return { kind: 'initial', why: 'first copy', fromBitmaps: false, fromBytes: () => 0, wholeAbove: true }
  }
  if (welcome.agentLostData === true) return { kind: 'full', why: 'the recovery site lost data that it had acknowledged', fromBitmaps: false, fromBytes: () => 0, wholeAbove: true }
  if (memory?.bitmaps === 'covered' && bitmapsWereThere) return { kind: 'bitmap', why, fromBitmaps: true, fromBytes: () => 0, wholeAbove: false }
  return { kind: 'full', why: `${why}; no bitmap says what changed`, fromBitmaps: false, fromBytes: () => 0, wholeAbove: true }
}

export type AttachContext = {
  vm: RunningVm
  worker: CaptureWorker
  targetPath: string
  readSocketPath: string
  /** QEMU's own NBD server that runs already, by the operator's configuration. */
  existingServerPath?: string
  memory: VmMemoryFile
  log: Logger
}

/** Looks at a VM before anything is done: half states of an earlier life are taken away, bitmaps stay. */
export const meetVm = (vm: RunningVm, readSocketPath: string): Promise<QemuDisk[]> =>
  withQmp(vm.qmpPath, { deadlineMs: QMP_DEADLINE_MS }, async (qmp) => {
    await repairHalfStates(qmp, { keepBitmaps: true, readSocketPath })
    return discoverDisks(qmp)
  })

/** Disk numbers are stable: sorted by key, scsi2 before scsi10. */
export const toDiskEntries = (disks: readonly QemuDisk[]): DiskEntry[] =>
  disks
    .toSorted((a, b) => a.key.localeCompare(b.key, 'en', { numeric: true }))
    .map(({ key, sizeBytes }, disk) => ({ disk, key, sizeBytes }))

/** Attaches the mirror jobs. The handshake comes first: a target that accepts and says nothing would freeze the VM. */
export const attachJobs = async (context: AttachContext, disks: readonly QemuDisk[]): Promise<{ attached: AttachedDisk[]; memory: VmMemory | undefined; bitmapsWereThere: boolean }> => {
  const { vm, targetPath } = context
  for (const { key } of disks) await checkHandshake({ path: targetPath }, key, HANDSHAKE_DEADLINE_MS)
  const memory = await context.memory.read(vm.instance)
  if (memory === undefined) await context.memory.write(vm.instance, 'attaching')
  return withQmp(vm.qmpPath, { deadlineMs: QMP_DEADLINE_MS }, async (qmp) => {
    const attached = await attachCapture(qmp, disks, { nbdSocketPath: targetPath, exportNameOf: (key) => key, keepBitmapsOnFailure: memory !== undefined })
    return { attached, memory, bitmapsWereThere: attached.every(({ bitmap }) => bitmap.existed) }
  })
}

/** Brings the agent in step: opens QEMU's read-only export, copies, closes it again. Resolves with the sequence of the sync's end. */
export const runSync = async (context: AttachContext, disks: readonly QemuDisk[], entries: readonly DiskEntry[], plan: SyncPlan, rateBytesPerSec: number): Promise<number> => {
  const { vm, worker, readSocketPath, existingServerPath } = context
  const qmpOptions = { deadlineMs: QMP_DEADLINE_MS }
  const exports = await withQmp(vm.qmpPath, qmpOptions, async (qmp) => {
    if (plan.fromBitmaps) await rotateBitmaps(qmp, disks)
    return openReadExport(qmp, disks, { socketPath: readSocketPath, ...(existingServerPath === undefined ? {} : { existingServerPath }), ...(plan.fromBitmaps ? { bitmap: 'rotated' } : {}) })
  })
  try {
    const { lastSeq } = await worker.ask('sync', {
      kind: plan.kind,
      reason: plan.why,
      exportSocketPath: exports[0].socketPath,
      rateBytesPerSec,
      disks: exports.map(({ key, exportName, sizeBytes, bitmapContext, dirtyBytes }) => {
        const { disk } = entries.find((entry) => entry.key === key) ?? { disk: -1 }
        const fromBytes = plan.fromBytes(disk)
        return {
          disk, exportName, sizeBytes, fromBytes, wholeAbove: plan.wholeAbove,
          totalBytes: plan.wholeAbove ? sizeBytes : dirtyBytes,
          ...(bitmapContext === undefined ? {} : { bitmapContext }),
        }
      }),
    })
    return lastSeq
  } finally {
    await withQmp(vm.qmpPath, qmpOptions, (qmp) => closeReadExport(qmp, { socketPath: readSocketPath })).catch((error: unknown) => {
      context.log.warn('the read export of a VM could not be closed; it is taken away with the next attach', { vmId: vm.vmId, error })
    })
  }
}

/** What the sync has copied is durable: the bitmaps that say what to copy are not needed any more. */
export const retireBitmaps = async (context: AttachContext, disks: readonly QemuDisk[]): Promise<void> => {
  await context.memory.write(context.vm.instance, 'covered')
  await withQmp(context.vm.qmpPath, { deadlineMs: QMP_DEADLINE_MS }, (qmp) => dropRotated(qmp, disks))
}

/** Takes capture out of QEMU. */
export const takeAway = async (vm: RunningVm, readSocketPath: string, keepBitmaps: boolean): Promise<void> => {
  await withQmp(vm.qmpPath, { deadlineMs: QMP_DEADLINE_MS }, (qmp) => detachCapture(qmp, { keepBitmaps, readSocketPath }))
}

export const lookAtCounters = (vm: RunningVm): Promise<Map<string, DiskCounters>> => withQmp(vm.qmpPath, { deadlineMs: 2_000 }, readCounters)
