import { CdpError } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import type { Welcome } from '../../core/stream/index.ts'
import type { CaptureWorker } from '../capture/index.ts'
import type { QemuDisk } from '../qemu/index.ts'
import { attachJobs, entriesOf, meetVm, numberedAs, planSync, whySyncAtStart } from './attach-procedure.ts'
import type { AttachContext, SyncPlan } from './attach-procedure.ts'
import { CaptureProver } from './capture-prover.ts'
import { takeOver } from './hand-over.ts'
import type { ProtectSettings } from './protect-settings.ts'
import type { StopWitness } from './stop-witness.ts'
import { readVmConfig } from './vm-files.ts'
import type { ProxmoxPaths, RunningVm } from './vm-files.ts'
import type { VmMemoryFile } from './vm-memory.ts'
import { requireDisks } from './worker-keeper.ts'
import type { WorkerKeeper } from './worker-keeper.ts'

const MAX_TAG_CHARACTERS = 200

/**
 * What an attach was made of, and whether its agent compares by hash. `disks`: those that come in step with it, and belong to checkpoints; `joining`: those
 * that are captured, and copied for the first time beside them. `entries` are those of both.
 */
export type Attached = { context: AttachContext; disks: readonly QemuDisk[]; joining: readonly QemuDisk[]; entries: readonly DiskEntry[]; hashes: boolean }

export const entriesInStep = ({ disks, entries }: Pick<Attached, 'disks' | 'entries'>): DiskEntry[] => entries.filter(({ key }) => disks.some((disk) => disk.key === key))

export type AttachParts = {
  vm: RunningVm
  vmId: number
  why: string
  /** The stream that there was may go on, if its agent agrees. */
  sameStream: boolean
  /** Something else has come first. */
  superseded: () => boolean
  /** The attach before this one. */
  before: Attached | undefined
  settings: ProtectSettings
  generation: number
  workers: WorkerKeeper
  stops: StopWitness
  memory: VmMemoryFile
  log: Logger
  targetPath: string
  readSocketPath: string
  nowUnixMs: () => number
}

export type MetAndAttached = {
  attached: Attached
  prover: CaptureProver
  /** How the VM comes in step; undefined: it is, nothing was missed. */
  plan: SyncPlan | undefined
  /** What the agent held when the stream was opened. */
  durableSeq: number
}

/**
 * Meets a QEMU, opens a stream for its disks, attaches the mirror jobs, and says how the VM comes in step. Undefined if something else came first.
 * @throws CdpError CONFLICT (retry: a backup or another operation is in the way), CAPTURE_ATTACH, QMP_*, ABORTED, and what the agent answers. Once the jobs
 *   are in QEMU, `workers.watchesTargets` is true
 */
export const meetAndAttach = async (parts: AttachParts): Promise<MetAndAttached | undefined> => {
  const { vm, vmId, why, superseded, settings, workers, stops, memory: memoryFile } = parts
  const [{ disks: found, carried }, config] = await Promise.all([meetVm(vm, parts.readSocketPath), readVmConfig(settings.paths, vmId)])
  stops.wentOn()
  await takeOver(vm, found, carried, memoryFile)
  const named = entriesOf(found)
  requireDisks(vmId, named)
  const worker = await workers.workerFor(named)
  if (superseded()) return undefined
  const epoch = { reason: why, ...(config === undefined ? {} : { config }) }
  const sizes = sizesOf(named)
  const rejoined = parts.sameStream && parts.before?.joining.length === 0 && (await worker.ask('rejoin', { epoch, sizes })).rejoined
  const welcome: Welcome & { agentLostData?: boolean } = rejoined
    ? { epoch: 0, generation: parts.generation, durableSeq: 0, baseComplete: true, syncProgress: {}, disks: [...(parts.before?.entries ?? [])], hashes: parts.before?.hashes === true }
    : await worker.ask('open', { reason: why, epoch, sizes })
  // Kept at once: whatever becomes of this attach, the next one must not take the bitmaps for all that is missing.
  if (!rejoined && (await hasLost(welcome, vm, memoryFile))) welcome.agentLostData = true
  if (superseded()) return undefined
  const entries = numberedAs(named, welcome.disks)
  const [joining, disks] = partition(found, ({ key }) => welcome.baseComplete && welcome.disks.some((one) => one.key === key && one.joining === true))
  // Figures from before speak of another stream.
  if (!rejoined) workers.forgetStats()
  const existingServerPath = settings.existingNbdServers[String(vmId)]
  const context: AttachContext = {
    vm, worker, memory: memoryFile, log: parts.log, targetPath: parts.targetPath, readSocketPath: parts.readSocketPath, ...(existingServerPath === undefined ? {} : { existingServerPath }),
  }
  // Before the attach: what was written until then is told by QEMU's counters.
  const start = rejoined ? undefined : await stops.lookBefore(vm, disks, await memoryFile.read(vm.instance))
  const { bytes: capturedBefore } = await worker.ask('captured', {})
  const { memory, bitmapsWereThere, wholeFrom } = await attachJobs(context, found, disks)
  const lost = found.find(({ key }) => !workers.isOpen(key))
  if (lost !== undefined) throw new CdpError('CAPTURE_ATTACH', `QEMU let go of ${lost.key} at once`)
  if (superseded()) throw new CdpError('ABORTED', 'the VM changed while capture was attached')
  workers.watchesTargets = true
  const prover = new CaptureProver({ worker, disks: entries, nowUnixMs: parts.nowUnixMs })
  const attached: Attached = { context, disks, joining, entries, hashes: welcome.hashes === true }
  const whyNotAtOnce = start === undefined ? undefined : await whySyncAtStart(context, start, prover, { capturedBefore, disks: entriesInStep(attached), welcome })
  if (superseded()) return undefined
  if (start !== undefined && whyNotAtOnce === undefined) return { attached, prover, plan: undefined, durableSeq: welcome.durableSeq }
  const plan = planSync(welcome, memory, bitmapsWereThere, whyNotAtOnce === undefined ? why : `${why}; ${whyNotAtOnce}`)
  if (!plan.fromBitmaps) {
    // What an earlier QEMU process had copied counts no more; the agent has to know that before our memory says that a copy began.
    if (Object.values(welcome.syncProgress).some((bytes) => bytes > 0)) await worker.ask('durable', { seq: (await worker.ask('restartCopy', {})).lastSeq })
    await memoryFile.write(vm.instance, 'copying')
  }
  return { attached, prover, plan: plan.kind === 'bitmap' ? { ...plan, wholeFrom } : keepingWhatWas(plan, vmId, whyNotAtOnce), durableSeq: welcome.durableSeq }
}

const partition = <T>(items: readonly T[], isFirst: (item: T) => boolean): [T[], T[]] => [items.filter(isFirst), items.filter((item) => !isFirst(item))]

/** Less is durable at the recovery site than it had acknowledged, ever. */
const hasLost = async (welcome: Welcome & { agentLostData?: boolean }, vm: RunningVm, memory: VmMemoryFile): Promise<boolean> => {
  if (welcome.agentLostData === true) await memory.distrust(vm.instance, welcome.durableSeq)
  return welcome.agentLostData === true || memory.losesTo(vm.instance, welcome.durableSeq)
}

/** A VM that was started may have been changed while it was off: what there was before is kept, if it was. */
const keepingWhatWas = (plan: SyncPlan, vmId: number, whyNotAtOnce: string | undefined): SyncPlan =>
  plan.kind === 'initial' || whyNotAtOnce === undefined ? plan : { ...plan, before: `before VM ${vmId} was started: ${whyNotAtOnce}`.slice(0, MAX_TAG_CHARACTERS) }

/** A new stream for disks of which the bitmaps say all that the agent needs. @throws CdpError CONFLICT if they do not; what the agent answers */
export const openStream = async (workers: WorkerKeeper, paths: ProxmoxPaths, vm: RunningVm, memory: VmMemoryFile, disks: readonly QemuDisk[], why: string): Promise<CaptureWorker> => {
  const entries = entriesOf(disks)
  const worker = await workers.workerFor(entries)
  const config = await readVmConfig(paths, vm.vmId)
  const welcome = await worker.ask('open', { reason: why, epoch: { reason: why, ...(config === undefined ? {} : { config }) }, sizes: sizesOf(entries) })
  if (!welcome.baseComplete || (await hasLost(welcome, vm, memory))) throw new CdpError('CONFLICT', 'the recovery site needs more than what the bitmaps say', { retry: true })
  workers.forgetStats()
  return worker
}

const sizesOf = (entries: readonly DiskEntry[]): Record<string, number> => Object.fromEntries(entries.map(({ key, sizeBytes }) => [key, sizeBytes]))
