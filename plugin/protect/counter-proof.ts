/** One look at a disk: bytes captured before and after QEMU was asked, and what QEMU said the guest has written. */
export type CounterSample = {
  capturedBeforeBytes: number
  capturedAfterBytes: number
  writtenBytes: number
  failedOperations: number
  /** QEMU waited for all writes under way between the first two: none that we had captured before was missing in its answer. */
  drained: boolean
}

export type CounterVerdict = { ok: boolean; missedBytes: number }

/**
 * Proves that every byte the guest wrote since the attach was captured (semantics.md: a checkpoint is proved).
 *
 * QEMU counts a write when it is complete, we when it arrives: written = uncaptured + captured - inFlight. The uncaptured bytes are
 * those of the attach itself, a constant; each sample bounds it from above by written - captured + inFlight. Written bytes beyond the
 * lowest bound so far were missed: an orphaned job. Bytes that others write through our node only lower the bound.
 * How much is in flight nobody says, and a write may hang for as long as it likes: only a drained look bounds without it.
 */
export class CounterProof {
  readonly #maxInFlightBytes: number
  #highestUncapturedBytes = Infinity
  #failedOperations: number | undefined

  /** @param maxInFlightBytes what QEMU may have acknowledged by us and not yet completed towards the guest: 16 requests of one connection */
  constructor(maxInFlightBytes: number) {
    this.#maxInFlightBytes = maxInFlightBytes
  }

  /** What was written and not captured, from above, in bytes; Infinity before the first look. */
  get uncapturedAtMostBytes(): number {
    return this.#highestUncapturedBytes
  }

  look(sample: CounterSample): CounterVerdict {
    const failed = this.#failedOperations !== undefined && sample.failedOperations !== this.#failedOperations
    this.#failedOperations = sample.failedOperations
    const missedBytes = Math.max(0, sample.writtenBytes - sample.capturedAfterBytes - this.#highestUncapturedBytes)
    const inFlightBytes = sample.drained ? 0 : this.#maxInFlightBytes
    this.#highestUncapturedBytes = Math.min(this.#highestUncapturedBytes, sample.writtenBytes - sample.capturedBeforeBytes + inFlightBytes)
    return { ok: missedBytes === 0 && !failed, missedBytes }
  }
}
