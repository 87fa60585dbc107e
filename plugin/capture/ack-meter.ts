/** What the acknowledgements of about one second cost, in microseconds. */
export type AckLatency = { count: number; p50Us: number; p99Us: number; maxUs: number; /** Acknowledgements that a group cut over nodes held back, and the longest such wait; not in the other figures. */ held: { count: number; maxUs: number } }

const BUCKETS = 64

/** Bucket n covers a quarter of a power of two: 1 us to 65 s with an error below 19 %. */
const bucketOf = (us: number): number => Math.min(BUCKETS * 2 - 1, Math.max(0, Math.floor(Math.log2(us + 1) * 4)))
const upperUs = (bucket: number): number => 2 ** ((bucket + 1) / 4) - 1

/**
 * Histogram of the latency that capture adds: from the arrival of a batch at this process to its acknowledgement. How late the
 * event loop itself ran counts too (`lateMs`): a request that waits for its turn waits for us.
 */
export class AckMeter {
  readonly #counts = new Uint32Array(BUCKETS * 2)
  #count = 0
  #maxUs = 0
  #heldCount = 0
  #heldMaxUs = 0

  /** A batch of `requests` was acknowledged `us` microseconds after it had arrived; `held`: a group cut held it back, which says nothing of how fast capture is. */
  add(us: number, requests: number, held: boolean): void {
    if (held) {
      this.#heldCount += requests
      if (us > this.#heldMaxUs) this.#heldMaxUs = us
      return
    }
    this.#counts[bucketOf(us)] += requests
    this.#count += requests
    if (us > this.#maxUs) this.#maxUs = us
  }

  /** The figures since the last call. */
  take(): AckLatency {
    const taken = { count: this.#count, p50Us: this.#quantile(0.5), p99Us: this.#quantile(0.99), maxUs: Math.round(this.#maxUs), held: { count: this.#heldCount, maxUs: Math.round(this.#heldMaxUs) } }
    this.#counts.fill(0)
    this.#count = 0
    this.#maxUs = 0
    this.#heldCount = 0
    this.#heldMaxUs = 0
    return taken
  }

  #quantile(share: number): number {
    let left = this.#count * share
    if (this.#count === 0) return 0
    for (let bucket = 0; bucket < this.#counts.length; bucket++) {
      left -= this.#counts[bucket]
      if (left <= 0) return Math.round(Math.min(upperUs(bucket), this.#maxUs))
    }
    return Math.round(this.#maxUs)
  }
}
