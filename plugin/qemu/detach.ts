import { CdpError } from '../../core/errors/index.ts'
import type { Qmp } from '../../core/qmp/index.ts'
import { blockingJob, queryBlockState, readChains } from './block-state.ts'
import type { BlockState } from './block-state.ts'
import { keyOfQdev, qomPathOf } from './disks.ts'
import { endsByItself, waitForGone } from './job.ts'
import { isOurs, keyOfName, keyOfRoundName, namesOf } from './names.ts'
import { removeExports, stopServerIfOurs } from './read-export.ts'
import { endRound } from './rounds.ts'

export type DetachOptions = {
  /** Leave our dirty bitmaps recording. */
  keepBitmaps: boolean
  /** Leave our read-only exports open: a sync goes on. */
  keepExports?: boolean
  /** Only these disks; default all. */
  keys?: readonly string[]
  /** Where our read-only NBD server would listen: it is stopped if it answers there and serves nothing of others. */
  readSocketPath?: string
  /** For each command and each wait. Default 5000. */
  stepDeadlineMs?: number
}

/** What was found and taken away, by name, in this order. */
export type TakenAway = { shields: string[]; jobs: string[]; targets: string[]; exports: string[]; bitmaps: string[]; serverStopped: boolean }

/**
 * Takes capture out of a VM, from whatever state it is in. Idempotent; asks QEMU what is there and believes nothing else.
 * Order: exports, guest back onto its own node, shield, job (and with it the filter), target, server, bitmaps. The guest goes first: a mirror
 * job that ends, other than in peace, while writes pass it uses memory after it has freed it (QEMU 10.0), and the guest is lost.
 * Never call it while our NBD server is silent: each of these commands then blocks QEMU's main loop until the server is gone.
 * End the server first; the jobs end with it.
 * @throws CdpError CONFLICT while a backup or disk move runs on one of the disks (nothing was done); TIMEOUT, CLOSED,
 *   QMP_COMMAND: part of it may be left; call again.
 */
export const detachCapture = async (qmp: Qmp, options: DetachOptions): Promise<TakenAway> => {
  const deadlineMs = options.stepDeadlineMs ?? 5000
  const isMine = (name: string): boolean => {
    const key = keyOfName(name)
    return isOurs(name) && key !== undefined && (options.keys === undefined || options.keys.includes(key))
  }
  let state = await queryBlockState(qmp)
  // A round of ours runs under a backup and can be taken away under it.
  if ([...state.jobs.map(({ id }) => id), ...state.nodes.map(({ name }) => name)].some((name) => keyOfRoundName(name) !== undefined)) {
    await endRound(qmp)
    state = await queryBlockState(qmp)
  }
  refuseWhileBlocked(state, isMine)
  const exports = options.keepExports ? [] : state.exports.map((entry) => entry.id).filter(isMine)
  await removeExports(qmp, exports, deadlineMs)
  await freeGuests(qmp, state, isMine, deadlineMs)
  const shields = state.nodes.map((node) => node.name).filter((name) => isMine(name) && name === namesOf(keyOfName(name) ?? '').shield)
  for (const shield of shields) await qmp.execute('blockdev-del', { 'node-name': shield }, { deadlineMs })
  const jobs = state.jobs.map((job) => job.id).filter(isMine)
  await endJobs(qmp, state, jobs, deadlineMs)
  const targets = state.nodes.map((node) => node.name).filter((name) => isMine(name) && name === namesOf(keyOfName(name) ?? '').target)
  for (const target of targets) await qmp.execute('blockdev-del', { 'node-name': target }, { deadlineMs })
  const serverStopped = options.readSocketPath === undefined ? false : await stopServerIfOurs(qmp, options.readSocketPath, deadlineMs)
  const bitmaps = options.keepBitmaps ? [] : await removeBitmaps(qmp, options.keys, deadlineMs)
  return { shields, jobs, targets, exports, bitmaps, serverStopped }
}

/** @throws CdpError CONFLICT while a job of somebody else holds one of the disks that we are on */
const refuseWhileBlocked = (state: BlockState, isMine: (name: string) => boolean): void => {
  const attachedKeys = [...state.jobs.map((job) => job.id), ...state.nodes.map((node) => node.name)].filter(isMine).map((name) => keyOfName(name) ?? '')
  const blocked = blockingJob(attachedKeys, state)
  if (blocked === undefined) return
  const { key, job } = blocked
  throw new CdpError('CONFLICT', `Capture cannot be taken from ${key}: a backup, a disk move or another block job runs on it`, {
    hint: 'Wait until that operation has ended.', retry: true, context: { key, job: job.id, type: job.type } })
}

/** @throws CdpError CONFLICT if `detachCapture` would be refused now; nothing is changed */
export const requireDetachable = async (qmp: Pick<Qmp, 'execute'>): Promise<void> => refuseWhileBlocked(await queryBlockState(qmp), (name) => keyOfName(name) !== undefined)

/** When the plugin meets a VM: everything of ours is taken away, whatever an earlier life left half done. */
export const repairHalfStates = (qmp: Qmp, options: Omit<DetachOptions, 'keys'>): Promise<TakenAway> => detachCapture(qmp, options)

/** Guests are put back onto their own nodes, below what is ours: from then on nothing passes a job of ours. */
const freeGuests = async (qmp: Qmp, state: BlockState, isMine: (name: string) => boolean, deadlineMs: number): Promise<void> => {
  const held = state.devices.filter((device) => isMine(device.rootNode))
  if (held.length === 0) return
  const chains = readChains(await qmp.execute('query-blockstats'))
  for (const { qdev, rootNode } of held) {
    const own = chains.get(qdev)?.find((name) => !isMine(name))
    if (own === undefined) throw new CdpError('QMP_PROTOCOL', `QEMU shows no node below ${rootNode}`, { context: { rootNode } })
    await qmp.execute('qom-set', { path: qomPathOf(qdev), property: 'drive', value: own }, { deadlineMs })
  }
}

// One after the other: the end of a job polls, and another one that ended in the middle of that would take the graph apart under its feet.
// A job is asked to end: what it has in flight still reaches the target. When that takes too long it is cut off. One whose target failed can only be cut off.
const endJobs = async (qmp: Qmp, state: BlockState, jobs: readonly string[], deadlineMs: number): Promise<void> => {
  for (const job of jobs) {
    const found = state.jobs.find((candidate) => candidate.id === job)
    // An attach that was broken off half way has left it paused.
    if (found?.paused && !found.failed) await ignoring(['GenericError'], () => qmp.execute('job-resume', { id: job }, { deadlineMs }))
    if (found?.ready && !found.failed && (await endsInPeace(qmp, job, deadlineMs))) continue
    const sinceMark = qmp.eventMark
    await cancelJob(qmp, job, true, deadlineMs)
    await waitForGone(qmp, job, { deadlineMs, sinceMark })
  }
}

/** @returns false if it has to be cut off: it took too long, or its target failed since we looked and QEMU has paused it */
const endsInPeace = async (qmp: Qmp, job: string, deadlineMs: number): Promise<boolean> => {
  const sinceMark = qmp.eventMark
  if (!(await ignoring(['GenericError'], () => cancelJob(qmp, job, false, deadlineMs)))) return false
  try {
    return await endsByItself(qmp, job, { deadlineMs: Math.min(deadlineMs, 2000), sinceMark })
  } catch (error) {
    if (!(error instanceof CdpError) || error.code !== 'TIMEOUT') throw error
    return false
  }
}

/** It may have ended meanwhile. */
const cancelJob = (qmp: Qmp, job: string, force: boolean, deadlineMs: number): Promise<boolean> =>
  ignoring(['DeviceNotActive'], () => qmp.execute('block-job-cancel', { device: job, force }, { deadlineMs }))

/** Refusals of QEMU of these classes are none. @returns false if there was one */
const ignoring = async (classes: readonly string[], command: () => Promise<unknown>): Promise<boolean> => {
  try {
    await command()
    return true
  } catch (error) {
    if (!(error instanceof CdpError) || !classes.includes(String(error.context['class']))) throw error
    return false
  }
}

const removeBitmaps = async (qmp: Qmp, keys: readonly string[] | undefined, deadlineMs: number): Promise<string[]> => {
  const [state, stats] = await Promise.all([queryBlockState(qmp), qmp.execute('query-blockstats')])
  const ofKeys = new Set([...readChains(stats)].flatMap(([qdev, chain]) => (keys === undefined || keys.includes(keyOfQdev(qdev) ?? '') ? chain : [])))
  const bitmaps = state.nodes.filter((node) => keys === undefined || ofKeys.has(node.name)).flatMap((node) => node.bitmaps).filter((bitmap) => isOurs(bitmap.name))
  for (const { node, name } of bitmaps) await qmp.execute('block-dirty-bitmap-remove', { node, name }, { deadlineMs })
  return bitmaps.map(({ name, node }) => `${node}/${name}`)
}
