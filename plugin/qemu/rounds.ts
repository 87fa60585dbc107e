import { CdpError } from '../../core/errors/index.ts'
import { asList, asObject, countField, optionalField, stringField } from '../../core/qmp/index.ts'
import type { Qmp } from '../../core/qmp/index.ts'
import { blockingJob, queryBlockState, readJobs, readNodes } from './block-state.ts'
import type { BlockJob } from './block-state.ts'
import type { QemuDisk } from './disks.ts'
import { keyOfName, keyOfRoundName, namesOf, roundNamesOf } from './names.ts'
import { planRound } from './round-plan.ts'
import type { RoundPlan, RoundTarget } from './round-plan.ts'

/** For each command and each wait. */
const STEP_DEADLINE_MS = 5000

type AnyJob = { id: string; status: string; error: string | undefined; doneBytes: number; totalBytes: number }

const queryJobs = async (qmp: Pick<Qmp, 'execute'>): Promise<AnyJob[]> =>
  asList(await qmp.execute('query-jobs'), 'query-jobs').map((value) => {
    const job = asObject(value, 'a job')
    return {
      id: stringField(job, 'id'), status: stringField(job, 'status'), error: optionalField(job, 'error', stringField), doneBytes: countField(job, 'current-progress'), totalBytes: countField(job, 'total-progress'),
    }
  })

/** The job of somebody else for which capture cannot be attached to these disks; undefined: there is none. */
export const jobInTheWay = async (qmp: Pick<Qmp, 'execute'>, keys: readonly string[]): Promise<BlockJob | undefined> => blockingJob(keys, await queryBlockState(qmp))?.job

/** Mirror jobs of ours that are in QEMU, running or not. */
export const ownMirrors = async (qmp: Pick<Qmp, 'execute'>): Promise<string[]> =>
  readJobs(await qmp.execute('query-block-jobs')).map(({ id }) => id).filter((id) => id === namesOf(keyOfName(id) ?? '').job)

/**
 * Begins an incremental round. The NBD server must have answered a handshake before. All or nothing.
 * @throws CdpError CONFLICT (see planRound; nothing was begun), QMP_*, TIMEOUT
 */
export const beginRound = async (qmp: Qmp, disks: readonly QemuDisk[], target: RoundTarget): Promise<Pick<RoundPlan, 'covered'>> => {
  const plan = planRound(disks, await queryBlockState(qmp), target)
  try {
    for (const { command, args } of [...plan.prepare, plan.transaction]) await qmp.execute(command, args, { deadlineMs: STEP_DEADLINE_MS })
    return plan
  } catch (error) {
    await endRound(qmp)
    throw error
  }
}

/** `failed`: a job's error, or that it is gone. */
export type RoundLook = { ended: boolean; failed: string | undefined; doneBytes: number; totalBytes: number }

export const lookAtRound = async (qmp: Pick<Qmp, 'execute'>, keys: readonly string[]): Promise<RoundLook> => {
  const jobs = await queryJobs(qmp)
  const look: RoundLook = { ended: true, failed: undefined, doneBytes: 0, totalBytes: 0 }
  for (const key of keys) {
    const job = jobs.find(({ id }) => id === roundNamesOf(key).job)
    if (job?.status !== 'concluded') look.ended = false
    if (job === undefined || job.error !== undefined) look.failed = `${key}: ${job?.error ?? 'the job is gone'}`
    look.doneBytes += job?.doneBytes ?? 0
    look.totalBytes += job?.totalBytes ?? 0
  }
  return look
}

/** Holds the copying of a round, or lets it go on; what the guest's writes make it copy goes on. Jobs that have ended are left alone. */
export const holdRound = async (qmp: Pick<Qmp, 'execute'>, keys: readonly string[], hold: boolean): Promise<void> => {
  for (const { id, status } of await queryJobs(qmp)) {
    if (!keys.some((key) => roundNamesOf(key).job === id) || (hold ? status !== 'running' : status !== 'paused')) continue
    try {
      await qmp.execute(hold ? 'job-pause' : 'job-resume', { id })
    } catch (error) {
      // It has just ended.
      if (!(error instanceof CdpError) || error.code !== 'QMP_COMMAND') throw error
    }
  }
}

/**
 * Takes everything of a round out of QEMU, from whatever state it is in: jobs that run are cut off, nodes go. Bitmaps stay. Idempotent. As with
 * `detachCapture`: never while our NBD server is silent.
 * @throws CdpError TIMEOUT, CLOSED, QMP_COMMAND: part of it may be left; call again
 */
export const endRound = async (qmp: Qmp): Promise<string[]> => {
  const sinceMark = qmp.eventMark
  const jobs = (await queryJobs(qmp)).filter(({ id }) => keyOfRoundName(id) !== undefined)
  for (const { id, status } of jobs) {
    if (status !== 'concluded') await qmp.execute('block-job-cancel', { device: id, force: true }, { deadlineMs: STEP_DEADLINE_MS }).catch(() => undefined)
  }
  for (const { id } of jobs) {
    if (!(await queryJobs(qmp)).some((job) => job.id === id && job.status === 'concluded')) {
      await qmp.waitForEvent(({ event, data }) => event === 'JOB_STATUS_CHANGE' && data['id'] === id && data['status'] === 'concluded', { deadlineMs: STEP_DEADLINE_MS, sinceMark })
    }
    await qmp.execute('job-dismiss', { id }, { deadlineMs: STEP_DEADLINE_MS })
  }
  const names = new Set(readNodes(await qmp.execute('query-named-block-nodes', { flat: true })).map(({ name }) => name))
  const keys = new Set([...names].flatMap((name) => keyOfRoundName(name) ?? []))
  const nodes = [...keys].flatMap((key) => [roundNamesOf(key).either, roundNamesOf(key).sink, roundNamesOf(key).target]).filter((name) => names.has(name))
  for (const name of nodes) await qmp.execute('blockdev-del', { 'node-name': name }, { deadlineMs: STEP_DEADLINE_MS })
  return [...jobs.map(({ id }) => id), ...nodes]
}

/** What these bitmaps say is durable at the recovery site. In one transaction. */
export const dropCovered = async (qmp: Pick<Qmp, 'execute'>, covered: RoundPlan['covered']): Promise<void> => {
  await qmp.execute('transaction', { actions: covered.map(({ node, name }) => ({ type: 'block-dirty-bitmap-remove', data: { node, name } })) })
}
