/**
 * The hold of acknowledgements in one capture worker, the first phase of a group cut over several nodes (semantics.md). It belongs to one
 * cut: a commit of any other, also of one whose own hold has lapsed and was followed by another, finds nothing.
 *
 * It counts as on until `end`, whatever the clock says: a worker that was stopped for a while has acknowledged nothing meanwhile.
 */
export class CutHold {
  readonly #onEnd: () => void
  #held: { cutId: string; namedSeq: number; timer: NodeJS.Timeout } | undefined

  /** @param onEnd sends what was held */
  constructor(onEnd: () => void) {
    this.#onEnd = onEnd
  }

  get isOn(): boolean {
    return this.#held !== undefined
  }

  /** Holds from now on, at most so long; `namedSeq` is the last sequence received. False if a hold is on already. */
  begin(cutId: string, namedSeq: number, holdMs: number): boolean {
    if (this.#held !== undefined) return false
    this.#held = { cutId, namedSeq, timer: setTimeout(() => this.end(), holdMs) }
    return true
  }

  /** What the cut names, while its hold is on; undefined otherwise. */
  namedSeq(cutId: string): number | undefined {
    return this.#held?.cutId === cutId ? this.#held.namedSeq : undefined
  }

  end(): void {
    if (this.#held === undefined) return
    clearTimeout(this.#held.timer)
    this.#held = undefined
    this.#onEnd()
  }
}
