const NOTE_EVERY_MS = 20

/** For how long what was recorded has waited to be durable at the agent: by that a copy beside live checkpoints knows when to wait. */
export class DurableLag {
  #noted: { seq: number; atMs: number }[] = []

  /** Everything up to `lastSeq` is recorded. */
  note(lastSeq: number, nowMs: number): void {
    const last = this.#noted.at(-1)
    if (last === undefined || (last.seq < lastSeq && nowMs - last.atMs >= NOTE_EVERY_MS)) this.#noted.push({ seq: lastSeq, atMs: nowMs })
  }

  /** At least so long ago the oldest of it was recorded that is not durable; 0: none is left. */
  ms(durableSeq: number, nowMs: number): number {
    while (this.#noted.length > 0 && this.#noted[0].seq <= durableSeq) this.#noted.shift()
    return this.#noted.length === 0 ? 0 : nowMs - this.#noted[0].atMs
  }
}
