import type { CheckpointMark } from '../../core/record/index.ts'
import type { CaptureWorker } from '../capture/index.ts'
import type { CommitAnswer, HoldAnswer } from './cut-over-nodes.ts'
import { commitWorkers, holdWorkers, releaseWorkers } from './group-cut.ts'

export type CutWorker = Pick<CaptureWorker, 'ask'>
/** The members of a group on this node, or why they cannot be held. */
export type LocalMembers = { vmIds: number[]; workers: readonly CutWorker[] } | { behind: string }

/**
 * One node's part in group cuts over several nodes, whoever coordinates them. What decides is each worker's own hold (CutHold): a commit
 * whose cut does not hold there any more inserts nothing.
 */
export class LocalPart {
  readonly #members: () => LocalMembers
  readonly #maxHoldMs: number
  #held: { cutId: string; vmIds: number[]; workers: readonly CutWorker[] } | undefined

  constructor(members: () => LocalMembers, maxHoldMs: number) {
    this.#members = members
    this.#maxHoldMs = maxHoldMs
  }

  /** First phase: all members or none. */
  async hold(cutId: string, holdMs: number): Promise<HoldAnswer> {
    const members = this.#members()
    if ('behind' in members) return { refused: members.behind }
    const refused = await holdWorkers(members.workers, cutId, Math.min(holdMs, this.#maxHoldMs))
    if (refused !== undefined) return { refused, retry: true }
    this.#held = { cutId, ...members }
    return { held: members.vmIds }
  }

  /** Second phase, by the very workers that were held. */
  async commit(cutId: string, mark: CheckpointMark): Promise<CommitAnswer> {
    const held = this.#held
    if (held?.cutId !== cutId) return { refused: 'the hold ran out' }
    this.#held = undefined
    const refused = await commitWorkers(held.workers, cutId, mark)
    if (refused === undefined) return { committed: held.vmIds }
    await releaseWorkers(held.workers, cutId)
    return { refused }
  }

  /** Also of a hold that is just being granted. */
  async release(cutId: string): Promise<void> {
    const members = this.#held?.cutId === cutId ? this.#held : this.#members()
    if (this.#held?.cutId === cutId) this.#held = undefined
    if ('workers' in members) await releaseWorkers(members.workers, cutId)
  }
}
