import { setImmediate as nextTurn } from 'node:timers/promises'
import type { Catalogue } from '../checkpoint/index.ts'
import { agedOut, isAtOrBefore } from './history-clock.ts'
import type { Candidate, HistoryClock } from './history-clock.ts'
import type { ThinningLevel } from './policy.ts'
import { stretchStart, thinOut } from './thin.ts'

export type ThinnerOptions = { catalogue: Catalogue; siteId: string; vpg: string; levels: readonly ThinningLevel[] }

const BATCH = 500
const BATCHES_A_TURN = 8

/**
 * Thins the list of one group, a few batches at a time; after a restart it goes through the list once more, which changes nothing. How old a
 * checkpoint is the history clock says, which stretch it is in its label: a label that jumps makes nothing old.
 */
export class Thinner {
  readonly #options: ThinnerOptions
  /** By level: all before this label is done. */
  readonly #doneUnixMs: number[]

  constructor(options: ThinnerOptions) {
    this.#options = options
    this.#doneUnixMs = options.levels.map(() => 0)
  }

  /** @param held ids that stay in any case @returns how many checkpoints went */
  async turn(clock: HistoryClock, held: ReadonlySet<string>): Promise<number> {
    let gone = 0
    let batches = 0
    for (const [level, { afterMs, everyMs }] of this.#options.levels.entries()) {
      const aged = agedOut(clock, afterMs)
      while (aged !== undefined && batches < BATCHES_A_TURN && aged.atUnixMs > this.#doneUnixMs[level]) {
        gone += this.#batch(level, everyMs, aged, held)
        batches++
        await nextTurn()
      }
    }
    return gone
  }

  /** From where this level is done to `aged`, which is not looked at itself. */
  #batch(level: number, everyMs: number, aged: Candidate, held: ReadonlySet<string>): number {
    const { catalogue, siteId, vpg } = this.#options
    const fromUnixMs = stretchStart(this.#doneUnixMs[level], everyMs)
    const entries = catalogue.ascending(siteId, vpg, { fromUnixMs, toUnixMs: aged.atUnixMs, limit: BATCH })
    const gone = thinOut(entries.map(({ id, atUnixMs, tag, state, namedSeqs }) => ({
      id, atUnixMs, isTagged: tag !== undefined, isSuspect: state === 'suspect' || state === 'damaged',
      // One whose label is older than it is stays as well.
      isHeld: held.has(id) || !isAtOrBefore({ id, atUnixMs, seqs: namedSeqs }, aged),
    })), everyMs)
    const goneIds = new Set(gone.map(({ id }) => id))
    if (gone.length > 0) catalogue.drop(siteId, vpg, entries.filter(({ id }) => goneIds.has(id)))
    const lastUnixMs = entries.at(-1)?.atUnixMs ?? 0
    // A stretch with more that stay than a batch holds is left as it is.
    this.#doneUnixMs[level] = entries.length < BATCH ? aged.atUnixMs : Math.max(lastUnixMs, gone.length === 0 ? fromUnixMs + everyMs : 0)
    return gone.length
  }
}
