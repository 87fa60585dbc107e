import { CdpError } from '../../core/errors/index.ts'
import type { Qmp } from '../../core/qmp/index.ts'
import { foreignJobOn, queryBlockState, readChains } from './block-state.ts'
import type { BlockState } from './block-state.ts'
import { keyOfQdev } from './disks.ts'
import { waitForGone } from './job.ts'
import { bitmapNumber, isOurs, keyOfName, namesOf } from './names.ts'
import { removeExports, stopServerIfOurs } from './read-export.ts'

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
 * Order: exports, guest back onto its own node, shield, job (and with it the filter), target, server, bitmaps.
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
  const state = await queryBlockState(qmp)
  const attachedKeys = [...state.jobs.map((job) => job.id), ...state.nodes.map((node) => node.name)].filter(isMine).map((name) => keyOfName(name) ?? '')
  const busyKey = attachedKeys.find((key) => foreignJobOn(key, state))
  if (busyKey !== undefined) {
    throw new CdpError('CONFLICT', `Capture cannot be taken from ${busyKey}: a backup, a disk move or another block job runs on it`, {
      hint: 'Wait until that operation has ended.', retry: true, context: { key: busyKey } })
  }
  const exports = options.keepExports ? [] : state.exports.map((entry) => entry.id).filter(isMine)
  await removeExports(qmp, exports, deadlineMs)
  const shields = await lowerShields(qmp, state, isMine, deadlineMs)
  const jobs = state.jobs.map((job) => job.id).filter(isMine)
  await endJobs(qmp, state, jobs, deadlineMs)
  const targets = state.nodes.map((node) => node.name).filter((name) => isMine(name) && name === namesOf(keyOfName(name) ?? '').target)
  for (const target of targets) await qmp.execute('blockdev-del', { 'node-name': target }, { deadlineMs })
  const serverStopped = options.readSocketPath === undefined ? false : await stopServerIfOurs(qmp, options.readSocketPath, deadlineMs)
  const bitmaps = options.keepBitmaps ? [] : await removeBitmaps(qmp, options.keys, deadlineMs)
  return { shields, jobs, targets, exports, bitmaps, serverStopped }
}

/** When the plugin meets a VM: everything of ours is taken away, whatever an earlier life left half done. */
export const repairHalfStates = (qmp: Qmp, options: Omit<DetachOptions, 'keys'>): Promise<TakenAway> => detachCapture(qmp, options)

const lowerShields = async (qmp: Qmp, state: BlockState, isMine: (name: string) => boolean, deadlineMs: number): Promise<string[]> => {
  const shields = state.nodes.map((node) => node.name).filter((name) => isMine(name) && name === namesOf(keyOfName(name) ?? '').shield)
  if (shields.length === 0) return shields
  const chains = readChains(await qmp.execute('query-blockstats'))
  for (const shield of shields) {
    const device = state.devices.find((candidate) => candidate.rootNode === shield)
    const below = device && chains.get(device.qdev)?.[1]
    if (device && below === undefined) throw new CdpError('QMP_PROTOCOL', `QEMU shows no node below ${shield}`, { context: { shield } })
    if (device) await qmp.execute('qom-set', { path: device.qdev.startsWith('/') ? device.qdev : `/machine/peripheral/${device.qdev}`, property: 'drive', value: below }, { deadlineMs })
    await qmp.execute('blockdev-del', { 'node-name': shield }, { deadlineMs })
  }
  return shields
}

// A ready job is asked to end: what it has in flight still reaches the target. When that takes too long it is cut off. A
// paused one (an attach broken off half way) can only be cut off.
const endJobs = async (qmp: Qmp, state: BlockState, jobs: readonly string[], deadlineMs: number): Promise<void> => {
  const sinceMark = qmp.eventMark
  const pending = jobs.map((job) => ({ job, ready: state.jobs.some((candidate) => candidate.id === job && candidate.ready && !candidate.paused) }))
  for (const { job, ready } of pending) await cancelJob(qmp, job, !ready, deadlineMs)
  for (const { job } of pending) {
    try {
      await waitForGone(qmp, job, { deadlineMs: Math.min(deadlineMs, 2000), sinceMark })
    } catch (error) {
      if (!(error instanceof CdpError) || error.code !== 'TIMEOUT') throw error
      await cancelJob(qmp, job, true, deadlineMs)
      await waitForGone(qmp, job, { deadlineMs, sinceMark })
    }
  }
}

const cancelJob = async (qmp: Qmp, job: string, force: boolean, deadlineMs: number): Promise<void> => {
  try {
    await qmp.execute('block-job-cancel', { device: job, force }, { deadlineMs })
  } catch (error) {
    const endedMeanwhile = error instanceof CdpError && error.context['class'] === 'DeviceNotActive'
    if (!endedMeanwhile) throw error
  }
}

const removeBitmaps = async (qmp: Qmp, keys: readonly string[] | undefined, deadlineMs: number): Promise<string[]> => {
  const [state, stats] = await Promise.all([queryBlockState(qmp), qmp.execute('query-blockstats')])
  const ofKeys = new Set([...readChains(stats)].flatMap(([qdev, chain]) => (keys === undefined || keys.includes(keyOfQdev(qdev) ?? '') ? chain : [])))
  const bitmaps = state.nodes.filter((node) => keys === undefined || ofKeys.has(node.name)).flatMap((node) => node.bitmaps).filter((bitmap) => bitmapNumber(bitmap.name) !== undefined)
  for (const { node, name } of bitmaps) await qmp.execute('block-dirty-bitmap-remove', { node, name }, { deadlineMs })
  return bitmaps.map(({ name, node }) => `${node}/${name}`)
}
