import type { CheckpointMark } from '../../core/record/index.ts'
import type { CaptureWorker, GroupClock } from '../capture/index.ts'

export type CutOutcome = { ok: true } | { ok: false; why: string }

/**
 * A group cut on one node: the shared counter is raised, which *is* the cut, and each worker puts the marker into its stream, naming the
 * last sequence that was stamped before the raise. No acknowledgement is held.
 */
export const cutOnOneNode = async (clock: GroupClock, workers: readonly CaptureWorker[], mark: CheckpointMark): Promise<CutOutcome> => {
  const c = clock.cut()
  const answers = await Promise.allSettled(workers.map((worker) => worker.ask('cut', { c, mark })))
  for (const answer of answers) {
    if (answer.status === 'rejected') return { ok: false, why: 'a capture worker ended' }
    if ('refused' in answer.value) return { ok: false, why: answer.value.refused }
  }
  return { ok: true }
}
