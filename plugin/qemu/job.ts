import { CdpError } from '../../core/errors/index.ts'
import type { Qmp, QmpEvent } from '../../core/qmp/index.ts'
import { readJobs } from './block-state.ts'

export type JobWait = { deadlineMs: number; sinceMark: number; signal?: AbortSignal }

const endsJob = (event: QmpEvent, job: string): boolean =>
  (event.event === 'BLOCK_JOB_COMPLETED' || event.event === 'BLOCK_JOB_CANCELLED') && event.data['device'] === job

/** @throws CdpError CAPTURE_ATTACH when the job ends instead; TIMEOUT; CLOSED. */
export const waitForReady = async (qmp: Qmp, job: string, wait: JobWait): Promise<void> => {
  const event = await qmp.waitForEvent((candidate) => endsJob(candidate, job) || (candidate.event === 'BLOCK_JOB_READY' && candidate.data['device'] === job), wait)
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

/** Waits until QEMU has forgotten the job: its filter is out of the graph then. @throws CdpError TIMEOUT; CLOSED. */
export const waitForGone = async (qmp: Qmp, job: string, wait: JobWait): Promise<void> => {
  const isThere = readJobs(await qmp.execute('query-block-jobs')).some((candidate) => candidate.id === job)
  if (!isThere) return
  await qmp.waitForEvent((event) => event.event === 'JOB_STATUS_CHANGE' && event.data['id'] === job && event.data['status'] === 'null', wait)
}
