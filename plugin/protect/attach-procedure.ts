import type { Logger } from '../../core/log/index.ts'
import { errorMessage } from '../../core/errors/index.ts'
import { checkHandshake } from '../../core/nbd/index.ts'
import { withQmp } from '../../core/qmp/index.ts'
import type { DiskEntry, SyncKind } from '../../core/record/index.ts'
import type { Welcome } from '../../core/stream/index.ts'
import type { CaptureWorker } from '../capture/index.ts'
import { attachCapture, carriedWith, closeReadExport, detachCapture, discoverDisks, dropRotated, lookAtVm, openReadExport, recordingKeys, repairHalfStates, requireDetachable, requireOwnGuest, rotateBitmaps } from '../qemu/index.ts'
import type { Carried, QemuDisk, VmLook } from '../qemu/index.ts'
import type { CaptureProver } from './capture-prover.ts'
import { whySync } from './clean-stop.ts'
import type { StartLook } from './stop-witness.ts'
import type { RunningVm } from './vm-files.ts'
import type { VmMemory, VmMemoryFile } from './vm-memory.ts'

const QMP_DEADLINE_MS = 10_000
const HANDSHAKE_DEADLINE_MS = 2_000
/** To get in line for the socket; a look that finds no way in is left out. */
const LOOK_DEADLINE_MS = 2_000
/** A guest that writes while it is looked at is looked at again. */
const START_LOOKS = 3

/** How a VM that was just attached comes in step with the agent. */
export type SyncPlan = {
  kind: SyncKind
  why: string
  fromBitmaps: boolean
  fromBytes: (disk: number) => number
  wholeAbove: boolean
  /** Above `fromBytes` only what differs is sent. */
  byHash: boolean
  /** In a bitmap sync: offsets in bytes, by disk key, from which on no bitmap says what is new. 0: a disk that came since; else the old end of one that has grown. */
  wholeFrom?: ReadonlyMap<string, number>
  /** What the newest checkpoint before it is called, if the sync changes anything. */
  before?: string
}

const fromStart = (): number => 0

/** Everything again: by hash, if the agent can. */
const wholeAgain = (welcome: Pick<Welcome, 'hashes'>, why: string): SyncPlan => {
  const byHash = welcome.hashes === true
  return { kind: byHash ? 'delta' : 'full', why, fromBitmaps: false, fromBytes: fromStart, wholeAbove: true, byHash }
}

/** Decides the kind of sync from what the agent holds and what QEMU's bitmaps prove. Pure. */
export const planSync = (welcome: Welcome & { agentLostData?: boolean }, memory: VmMemory | undefined, bitmapsWereThere: boolean, why: string): SyncPlan => {
  const copied = (disk: number): number => welcome.syncProgress[String(disk)] ?? 0
  if (!welcome.baseComplete) {
    const byHash = welcome.hashes === true && welcome.mirrorHasData === true
    if (memory?.bitmaps === 'copying' && bitmapsWereThere) return { kind: 'initial', why: `first copy goes on: ${why}`, fromBitmaps: true, fromBytes: copied, wholeAbove: true, byHash }
    return { kind: 'initial', why: byHash ? 'first copy, compared with what is there' : 'first copy', fromBitmaps: false, fromBytes: fromStart, wholeAbove: true, byHash }
  }
  if (welcome.agentLostData === true) return wholeAgain(welcome, 'the recovery site lost data that it had acknowledged')
  if (memory?.bitmaps === 'covered' && bitmapsWereThere) return { kind: 'bitmap', why, fromBitmaps: true, fromBytes: fromStart, wholeAbove: false, byHash: false }
  const { progress } = memory ?? {}
  if (memory?.bitmaps === 'copying' && bitmapsWereThere && progress !== undefined && welcome.hashes === true) {
    return { kind: 'delta', why: `comparison goes on: ${why}`, fromBitmaps: true, fromBytes: (disk) => progress[String(disk)] ?? 0, wholeAbove: true, byHash: true }
  }
  return wholeAgain(welcome, `${why}; no bitmap says what changed`)
}

/** A comparison of everything, of a VM that is in step. */
export const planForced = (why: string): SyncPlan => ({ kind: 'delta', why, fromBitmaps: false, fromBytes: fromStart, wholeAbove: true, byHash: true })

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

/**
 * Looks at a VM before anything is done: half states of an earlier life are taken away, bitmaps stay. `carried`: see `carriedWith`.
 * @throws CdpError CONFLICT while the VM is not this QEMU's (a migration is not over); nothing was done then
 */
export const meetVm = (vm: RunningVm, readSocketPath: string): Promise<{ disks: QemuDisk[]; carried: Carried | undefined }> =>
  withQmp(vm.qmpPath, { deadlineMs: QMP_DEADLINE_MS }, async (qmp) => {
    await requireOwnGuest(qmp)
    await repairHalfStates(qmp, { keepBitmaps: true, readSocketPath })
    const disks = await discoverDisks(qmp)
    return { disks, carried: await carriedWith(qmp, disks) }
  })

const byKey = (a: { key: string }, b: { key: string }): number => a.key.localeCompare(b.key, 'en', { numeric: true })

/** The disks as they are told to the agent: scsi2 before scsi10. It gives them their numbers. */
export const entriesOf = (disks: readonly QemuDisk[]): DiskEntry[] => disks.toSorted(byKey).map(({ key, sizeBytes }, disk) => ({ disk, key, sizeBytes }))

/** The same disks with the numbers that the agent gave. */
export const numberedAs = (entries: readonly DiskEntry[], given: readonly DiskEntry[]): DiskEntry[] =>
  entries.map((entry) => ({ ...entry, disk: given.find(({ key }) => key === entry.key)?.disk ?? entry.disk }))

export type AttachedJobs = {
  memory: VmMemory | undefined
  /** The bitmaps of all disks that the memory speaks of recorded before this attach. */
  bitmapsWereThere: boolean
  /** See SyncPlan: disks that came or grew since what the memory speaks of. */
  wholeFrom: ReadonlyMap<string, number>
}

/** From where on the memory says nothing of a disk, by key. */
const unknownFrom = (memory: VmMemory | undefined, disks: readonly QemuDisk[]): Map<string, number> => {
  const known = memory?.disks
  if (known === undefined) return new Map()
  return new Map(disks.flatMap(({ key, sizeBytes }): [string, number][] => {
    const knownBytes = known[key] ?? 0
    return knownBytes === sizeBytes ? [] : [[key, knownBytes < sizeBytes ? knownBytes : 0]]
  }))
}

/**
 * Attaches the mirror jobs. The handshake comes first: a target that accepts and says nothing would freeze the VM.
 * @param whole the disks of which the recovery site holds something, or that come with this attach's sync: what is said of bitmaps is about these
 */
export const attachJobs = async (context: AttachContext, disks: readonly QemuDisk[], whole = disks): Promise<AttachedJobs> => {
  const { vm, targetPath } = context
  await Promise.all(disks.map(({ key }) => checkHandshake({ path: targetPath }, key, HANDSHAKE_DEADLINE_MS)))
  const memory = await context.memory.read(vm.instance)
  if (memory === undefined) await context.memory.write(vm.instance, 'attaching')
  const wholeFrom = unknownFrom(memory, whole)
  return withQmp(vm.qmpPath, { deadlineMs: QMP_DEADLINE_MS }, async (qmp) => {
    const recording = await recordingKeys(qmp, disks)
    const bitmapsWereThere = whole.every(({ key }) => wholeFrom.get(key) === 0 || recording.has(key))
    // The attach makes new bitmaps where some are gone (a disk move takes them away): what is remembered of the old ones must not be believed of those.
    if (memory !== undefined && !bitmapsWereThere) await context.memory.write(vm.instance, 'attaching')
    await attachCapture(qmp, disks, { nbdSocketPath: targetPath, exportNameOf: (key) => key, keepBitmapsOnFailure: memory !== undefined })
    return { memory, bitmapsWereThere, wholeFrom }
  })
}

/** Why a QEMU that was just attached to for the first time needs a sync; undefined if nothing can have been missed. */
export const whySyncAtStart = async (
  { vm, log }: AttachContext, start: StartLook, prover: CaptureProver, { capturedBefore, disks, welcome }: { capturedBefore: Record<string, number>; disks: readonly DiskEntry[]; welcome: Welcome & { agentLostData?: boolean } },
): Promise<string | undefined> => {
  let missed: string | undefined
  for (let looks = 0; looks < START_LOOKS; looks++) {
    await prover.check(() => lookAt(vm, { drained: true }), () => undefined).catch((error: unknown) => log.warn('the counters of a VM that was started could not be looked at', { vmId: vm.vmId, error: errorMessage(error) }))
    missed = prover.doubt(Infinity) ?? prover.missedSinceStart(capturedBefore)
    if (missed === undefined) break
  }
  return welcome.baseComplete ? whySync(start.note, { ...start, welcome, disks, missed }) : 'the recovery site has no complete copy'
}

/** Brings the agent in step: opens QEMU's read-only export, copies, closes it again. Resolves with the sequence of the sync's end. */
export const runSync = async (context: AttachContext, disks: readonly QemuDisk[], entries: readonly DiskEntry[], plan: SyncPlan, rateBytesPerSec: number): Promise<number> => {
  return withReadExport(context, disks, { rotated: plan.fromBitmaps }, async (exports) => {
    const { lastSeq } = await context.worker.ask('sync', {
      kind: plan.kind,
      reason: plan.why,
      ...(plan.before === undefined ? {} : { before: plan.before }),
      exportSocketPath: exports[0].socketPath,
      rateBytesPerSec,
      disks: exports.map(({ key, exportName, sizeBytes, bitmapContext, dirtyBytes }) => {
        const disk = numberOf(entries, key)
        const wholeFromBytes = plan.wholeFrom?.get(key)
        return {
          disk, exportName, sizeBytes, fromBytes: wholeFromBytes ?? plan.fromBytes(disk), wholeAbove: plan.wholeAbove || wholeFromBytes !== undefined, byHash: plan.byHash,
          totalBytes: plan.wholeAbove ? sizeBytes : dirtyBytes + (wholeFromBytes === undefined ? 0 : sizeBytes - wholeFromBytes),
          ...(bitmapContext === undefined ? {} : { bitmapContext }),
        }
      }),
    })
    return lastSeq
  })
}

export type JoinOptions = { byHash: boolean; rateBytesPerSec: number; signal: AbortSignal }

/** Copies a disk that is joining, whole: by hash where the agent can, since it may hold most of it. Resolves with the sequence of the copy's end. @throws the signal's reason, and what the worker throws */
export const copyJoining = (context: AttachContext, joining: QemuDisk, entries: readonly DiskEntry[], { byHash, rateBytesPerSec, signal }: JoinOptions): Promise<number> =>
  withReadExport(context, [joining], { rotated: false }, async ([{ key, socketPath, exportName, sizeBytes }]) => {
    signal.throwIfAborted()
    const end = (): void => void context.worker.ask('endJoin', { why: errorMessage(signal.reason) }).catch(() => undefined)
    signal.addEventListener('abort', end, { once: true })
    try {
      const copied = { disk: numberOf(entries, key), exportName, sizeBytes, fromBytes: 0, wholeAbove: true, byHash, totalBytes: sizeBytes }
      const { lastSeq } = await context.worker.ask('join', { exportSocketPath: socketPath, rateBytesPerSec, disks: [copied] })
      return lastSeq
    } finally {
      signal.removeEventListener('abort', end)
    }
  })

const numberOf = (entries: readonly DiskEntry[], key: string): number => entries.find((entry) => entry.key === key)?.disk ?? -1

/** `rotated`: with the bitmaps that recorded until now; they stand still. The export is closed again whatever happens. */
const withReadExport = async <T>(context: AttachContext, disks: readonly QemuDisk[], { rotated }: { rotated: boolean }, work: (exports: Awaited<ReturnType<typeof openReadExport>>) => Promise<T>): Promise<T> => {
  const { vm, readSocketPath, existingServerPath } = context
  const qmpOptions = { deadlineMs: QMP_DEADLINE_MS }
  const exports = await withQmp(vm.qmpPath, qmpOptions, async (qmp) => {
    // One that could not be closed at its end.
    await closeReadExport(qmp, { socketPath: readSocketPath })
    if (rotated) await rotateBitmaps(qmp, disks)
    return openReadExport(qmp, disks, { socketPath: readSocketPath, ...(existingServerPath === undefined ? {} : { existingServerPath }), ...(rotated ? { bitmap: 'rotated' } : {}) })
  })
  try {
    return await work(exports)
  } finally {
    await withQmp(vm.qmpPath, qmpOptions, (qmp) => closeReadExport(qmp, { socketPath: readSocketPath })).catch((error: unknown) => {
      context.log.warn('the read export of a VM could not be closed; it is taken away with the next attach', { vmId: vm.vmId, error })
    })
  }
}

/** What is in no bitmap is durable at the agent, with everything up to `durableSeq`. */
export const coverFromHere = ({ memory, vm }: AttachContext, disks: readonly QemuDisk[], durableSeq: number): Promise<void> =>
  memory.write(vm.instance, 'covered', Object.fromEntries(disks.map(({ key, sizeBytes }) => [key, sizeBytes])), durableSeq)

/** What the sync has copied is durable: the bitmaps that say what to copy are not needed any more. */
export const retireBitmaps = async (context: AttachContext, disks: readonly QemuDisk[], durableSeq: number): Promise<void> => {
  await coverFromHere(context, disks, durableSeq)
  await withQmp(context.vm.qmpPath, { deadlineMs: QMP_DEADLINE_MS }, (qmp) => dropRotated(qmp, disks))
}

/** Takes capture out of QEMU. @throws CdpError CONFLICT while somebody else's job holds a disk; nothing was done then */
export const takeAway = async (vm: RunningVm, readSocketPath: string, keepBitmaps: boolean): Promise<void> => {
  await withQmp(vm.qmpPath, { deadlineMs: QMP_DEADLINE_MS }, (qmp) => detachCapture(qmp, { keepBitmaps, readSocketPath }))
}

/** @throws CdpError CONFLICT if `takeAway` would be refused now */
export const requireTakeable = (vm: RunningVm): Promise<void> => withQmp(vm.qmpPath, { deadlineMs: QMP_DEADLINE_MS }, requireDetachable)

/** `patient`: a look that cannot be left out. */
export const lookAt = (vm: RunningVm, { drained, patient }: { drained: boolean; patient?: boolean }): Promise<VmLook> =>
  withQmp(vm.qmpPath, { deadlineMs: patient === true ? QMP_DEADLINE_MS : LOOK_DEADLINE_MS }, (qmp) => lookAtVm(qmp, { drained }))

/** First half of a rotation: what recorded stands still; the look that follows is the second command that drains. */
export const rotateAndLook = (vm: RunningVm, disks: readonly QemuDisk[]): Promise<VmLook> =>
  withQmp(vm.qmpPath, { deadlineMs: LOOK_DEADLINE_MS }, async (qmp) => {
    await rotateBitmaps(qmp, disks)
    return lookAtVm(qmp, { drained: true })
  })

/** Second half: what stands still is not needed any more. */
export const dropStill = async (vm: RunningVm, disks: readonly QemuDisk[]): Promise<void> => {
  await withQmp(vm.qmpPath, { deadlineMs: LOOK_DEADLINE_MS }, (qmp) => dropRotated(qmp, disks))
}
