import { errorMessage } from '../../core/errors/index.ts'
import type { CheckpointMark } from '../../core/record/index.ts'
import { beginTwoPhaseCut, nextTwoPhaseCut } from './two-phase-cut.ts'
import type { CutOutcome, TwoPhaseEffect, TwoPhaseEvent, TwoPhaseStep } from './two-phase-cut.ts'

export type HoldAnswer = { held: number[] } | { refused: string; retry?: boolean }
export type CommitAnswer = { committed: number[] } | { refused: string }

/** A node that runs members of a group, as the coordinator sees it; the coordinator's own node is one as well. A rejection counts as a refusal. */
export type CutParticipant = {
  readonly node: string
  /** Holds the acknowledgements of all its members, at most so long. */
  hold(vpg: string, cutId: string, holdMs: number): Promise<HoldAnswer>
  /** Inserts the marker; refused unless that cut's hold is still on. */
  commit(vpg: string, cutId: string, mark: CheckpointMark): Promise<CommitAnswer>
  release(vpg: string, cutId: string): Promise<unknown>
}

export type CutOverNodesOptions = {
  participants: readonly CutParticipant[]
  /** All members of the group. */
  vmIds: readonly number[]
  cutId: string
  mark: CheckpointMark
  holdMs: number
  /** How long answers to COMMIT are waited for; nothing is held any more by then. */
  commitAnswerMs: number
}

/** Runs one group cut over several nodes. Never throws; takes at most `holdMs + commitAnswerMs`. */
export const cutOverNodes = ({ participants, vmIds, cutId, mark, holdMs, commitAnswerMs }: CutOverNodesOptions): Promise<CutOutcome> => {
  const { promise, resolve } = Promise.withResolvers<CutOutcome>()
  const byNode = new Map(participants.map((participant) => [participant.node, participant]))
  let step: TwoPhaseStep = beginTwoPhaseCut([...byNode.keys()], vmIds)
  const late = (): void => dispatch({ on: 'late' })
  let timer = setTimeout(late, holdMs)

  const perform = (effect: TwoPhaseEffect): void => {
    const { node } = effect
    const participant = byNode.get(node)
    if (participant === undefined) return
    const failed = (error: unknown): void => dispatch({ on: 'refused', node, why: errorMessage(error) })
    switch (effect.do) {
      case 'hold':
        return void participant.hold(mark.vpg, cutId, holdMs).then((answer) => {
          if ('held' in answer) dispatch({ on: 'held', node, vmIds: answer.held })
          else dispatch({ on: 'refused', node, why: answer.refused, retry: answer.retry === true })
        }, failed)
      case 'commit':
        return void participant.commit(mark.vpg, cutId, mark).then((answer) => {
          dispatch('committed' in answer ? { on: 'committed', node } : { on: 'refused', node, why: answer.refused })
        }, failed)
      case 'release':
        // A node that cannot be reached lets its hold run out.
        return void participant.release(mark.vpg, cutId).catch(() => undefined)
    }
  }
  const dispatch = (event: TwoPhaseEvent): void => {
    const before = step.state
    step = nextTwoPhaseCut(before, event)
    if (step.state.is !== before.is) {
      clearTimeout(timer)
      if (step.state.is === 'committing') timer = setTimeout(late, commitAnswerMs)
      if (step.state.is === 'ended') resolve(step.state.outcome)
    }
    for (const effect of step.effects) perform(effect)
  }
  for (const effect of step.effects) perform(effect)
  return promise
}
