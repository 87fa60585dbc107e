import { CdpError } from '../../core/errors/index.ts'
import type { Qmp, QmpEvent } from '../../core/qmp/index.ts'
import { readJobs } from './block-state.ts'
import type { BlockJob } from './block-state.ts'

export type JobWait = { deadlineMs: number; sinceMark: number; signal?: AbortSignal }

const endsJob = (event: QmpEvent, job: string): boolean =>
  (event.event === 'BLOCK_JOB_COMPLETED' || event.event === 'BLOCK_JOB_CANCELLED') && event.data['device'] === job

/** The job stands still: its target did not take what it was given. */
const failsJob = (event: QmpEvent, job: string): boolean => event.event === 'BLOCK_JOB_ERROR' && event.data['device'] === job

/** @throws CdpError CAPTURE_ATTACH when the job ends or fails instead; TIMEOUT; CLOSED. */
export const waitForReady = async (qmp: Qmp, job: string, wait: JobWait): Promise<void> => {
  const event = await qmp.waitForEvent((candidate) => endsJob(candidate, job) || failsJob(candidate, job) || (candidate.event === 'BLOCK_JOB_READY' && candidate.data['device'] === job), wait)
  if (event.event === 'BLOCK_JOB_READY') return
  const reason = typeof event.data['error'] === 'string' ? event.data['error'] : 'no reason given'
  throw new CdpError('CAPTURE_ATTACH', `The mirror job ${job} ended before it was ready: ${reason}`, { context: { job, reason } })
}

/**
 * Waits until a job that was told to pause stands still. Drains make the status flap, so only what is seen after the pause counts.
 * @throws CdpError CAPTURE_ATTACH when the job is gone; TIMEOUT; CLOSED.
 */
export const waitForStandby = async (qmp: Qmp, job: string, wait: JobWait): Promise<void> => {
  let sinceMark = wait.sinceMark
  while (true) {
    const nextMark = qmp.eventMark
    const found = readJobs(await qmp.execute('query-block-jobs')).find((candidate) => candidate.id === job)
    if (!found) throw new CdpError('CAPTURE_ATTACH', `The mirror job ${job} ended while capture was being attached`, { context: { job } })
    if (found.status === 'standby') return
    await qmp.waitForEvent((event) => event.event === 'JOB_STATUS_CHANGE' && event.data['id'] === job, { ...wait, sinceMark })
    sinceMark = nextMark
  }
}

const forgetsJob = (event: QmpEvent, job: string): boolean => event.event === 'JOB_STATUS_CHANGE' && event.data['id'] === job && event.data['status'] === 'null'

/** Waits until QEMU has forgotten the job: its filter is out of the graph then. @throws CdpError TIMEOUT; CLOSED. */
export const waitForGone = async (qmp: Qmp, job: string, wait: JobWait): Promise<void> => {
  if (await jobOf(qmp, job)) await qmp.waitForEvent((event) => forgetsJob(event, job), wait)
}

/** The same; false if an error of its target stopped it instead. @throws CdpError TIMEOUT; CLOSED. */
export const endsByItself = async (qmp: Qmp, job: string, wait: JobWait): Promise<boolean> => {
  const found = await jobOf(qmp, job)
  if (found === undefined || found.failed) return found === undefined
  return forgetsJob(await qmp.waitForEvent((event) => forgetsJob(event, job) || failsJob(event, job), wait), job)
}

const jobOf = async (qmp: Qmp, job: string): Promise<BlockJob | undefined> => readJobs(await qmp.execute('query-block-jobs')).find((candidate) => candidate.id === job)
