import { parentPort } from 'node:worker_threads'
import { errorCode, errorMessage } from '../../core/errors/index.ts'
import { yieldToOthers } from '../../core/threads/index.ts'
import { SCAN_WINDOW_BYTES } from './frame-scan.ts'
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

const window = Buffer.allocUnsafeSlow(SCAN_WINDOW_BYTES)

const perform = async (job: SealingJob): Promise<SealingAnswer> => {
  try {
    if (job.is === 'seal') return { id: job.id, is: 'sealed', result: await sealSegment(job.request, window) }
    return { id: job.id, is: 'verified', result: await verifySegment(job.request) }
  } catch (error) {
    return { id: job.id, is: 'failed', message: errorMessage(error), code: errorCode(error) }
  }
}

// What is to be sealed is durable already.
yieldToOthers()
// The sealer sends at most one of each kind at a time.
parentPort?.on('message', (job: SealingJob) => {
  void perform(job).then((answer) => parentPort?.postMessage(answer))
})
