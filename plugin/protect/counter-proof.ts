/** One look at a disk: bytes captured before and after QEMU was asked, and what QEMU said the guest has written. */
export type CounterSample = { capturedBeforeBytes: number; capturedAfterBytes: number; writtenBytes: number; failedOperations: number }

export type CounterVerdict = { ok: boolean; missedBytes: number }

/**
 * Proves that every byte the guest wrote since the attach was captured (semantics.md: a checkpoint is proved).
 *
 * QEMU counts a write when it is complete, we when it arrives: written = uncaptured + captured - inFlight. The uncaptured bytes are
 * those of the attach itself, a constant; each sample bounds it from above by written - captured + inFlight. Written bytes beyond the
 * lowest bound so far were missed: an orphaned job. Bytes that others write through our node only lower the bound.
 */
export class CounterProof {
  readonly #maxInFlightBytes: number
  #highestUncapturedBytes = Infinity
  #failedOperations: number | undefined

  /** @param maxInFlightBytes what QEMU may have acknowledged by us and not yet completed towards the guest: 16 requests of one connection */
  constructor(maxInFlightBytes: number) {
    this.#maxInFlightBytes = maxInFlightBytes
  }

  look(sample: CounterSample): CounterVerdict {
    const failed = this.#failedOperations !== undefined && sample.failedOperations !== this.#failedOperations
    this.#failedOperations = sample.failedOperations
    const missedBytes = Math.max(0, sample.writtenBytes - sample.capturedAfterBytes - this.#highestUncapturedBytes)
    // With no traffic around the question nothing was in flight, and the bound is exact.
    const inFlightBytes = sample.capturedBeforeBytes === sample.capturedAfterBytes && this.#idle(sample) ? 0 : this.#maxInFlightBytes
    this.#last = { captured: sample.capturedAfterBytes, written: sample.writtenBytes }
    this.#highestUncapturedBytes = Math.min(this.#highestUncapturedBytes, sample.writtenBytes - sample.capturedBeforeBytes + inFlightBytes)
    return { ok: missedBytes === 0 && !failed, missedBytes }
  }

  #last: { captured: number; written: number } | undefined

  #idle(sample: CounterSample): boolean {
    return this.#last?.captured === sample.capturedAfterBytes && this.#last.written === sample.writtenBytes
  }
}
