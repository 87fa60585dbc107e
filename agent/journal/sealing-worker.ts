import { parentPort } from 'node:worker_threads'
import { errorCode, errorMessage } from '../../core/errors/index.ts'
import { sealSegment } from './seal-segment.ts'
import type { SealRequest, SealResult } from './seal-segment.ts'
import { verifySegment } from './verify-segment.ts'
import type { VerifiedSegment, VerifyRequest } from './verify-segment.ts'

export type SealingJob = { id: number } & ({ is: 'seal'; request: SealRequest } | { is: 'verify'; request: VerifyRequest })
export type SealingAnswer = { id: number } & (
  | { is: 'sealed'; result: SealResult }
  | { is: 'verified'; result: VerifiedSegment }
  | { is: 'failed'; message: string; code: string | undefined }
)

const perform = async (job: SealingJob): Promise<SealingAnswer> => {
  try {
    if (job.is === 'seal') return { id: job.id, is: 'sealed', result: await sealSegment(job.request) }
    return { id: job.id, is: 'verified', result: await verifySegment(job.request) }
  } catch (error) {
    return { id: job.id, is: 'failed', message: errorMessage(error), code: errorCode(error) }
  }
}

// One job at a time: the sealer sends the next one when this one is answered.
parentPort?.on('message', (job: SealingJob) => {
  void perform(job).then((answer) => parentPort?.postMessage(answer))
})
