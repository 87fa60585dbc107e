import type { CheckpointMark } from '../../core/record/index.ts'
import type { CaptureWorker, GroupClock } from '../capture/index.ts'
import type { CutOutcome } from './two-phase-cut.ts'

type CutWorker = Pick<CaptureWorker, 'ask'>

/**
 * A group cut on one node: the shared counter is raised, which *is* the cut, and each worker puts the marker into its stream, naming the
 * last sequence that was stamped before the raise. No acknowledgement is held.
 */
export const cutOnOneNode = async (clock: GroupClock, workers: readonly CutWorker[], mark: CheckpointMark): Promise<CutOutcome> => {
  const c = clock.cut()
  const refused = await askAll(workers, (worker) => worker.ask('cut', { c, mark }))
  return refused === undefined ? { ok: true } : { ok: false, why: refused }
}

/** First phase of a cut over several nodes, on one of them. Returns why not, or undefined when all hold; after a refusal none does. */
export const holdWorkers = async (workers: readonly CutWorker[], cutId: string, holdMs: number): Promise<string | undefined> => {
  const refused = await askAll(workers, (worker) => worker.ask('hold', { cutId, holdMs }))
  if (refused !== undefined) await releaseWorkers(workers, cutId)
  return refused
}

/** Second phase. Returns why a marker could not be inserted, or undefined when all were. */
export const commitWorkers = (workers: readonly CutWorker[], cutId: string, mark: CheckpointMark): Promise<string | undefined> =>
  askAll(workers, (worker) => worker.ask('commit', { cutId, mark }))

export const releaseWorkers = async (workers: readonly CutWorker[], cutId: string): Promise<void> => {
  await Promise.allSettled(workers.map((worker) => worker.ask('release', { cutId })))
}

const askAll = async (workers: readonly CutWorker[], ask: (worker: CutWorker) => Promise<{ namedSeq: number } | { refused: string }>): Promise<string | undefined> => {
  const answers = await Promise.allSettled(workers.map(ask))
  for (const answer of answers) {
    if (answer.status === 'rejected') return 'a capture worker ended'
    if ('refused' in answer.value) return answer.value.refused
  }
  return undefined
}
