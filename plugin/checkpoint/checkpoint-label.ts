/** Labels of checkpoints: wall time for people, strictly growing whatever the clock does (semantics.md: label = max(previous + 1 ms, now)). */
export class CheckpointLabels {
  #previousUnixMs = 0

  next(nowUnixMs: number): number {
    this.#previousUnixMs = Math.max(this.#previousUnixMs + 1, nowUnixMs)
    return this.#previousUnixMs
  }
}
