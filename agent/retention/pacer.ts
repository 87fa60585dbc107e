import { setTimeout as delay } from 'node:timers/promises'

export type PacerOptions = {
  bytesPerSec: number
  /** Ingest has work waiting: promotion lets it go first. */
  isBusy: () => boolean
  monotonicMs?: () => number
  sleep?: (ms: number, signal: AbortSignal) => Promise<unknown>
}

/** Frames that wait in a store: promotion lets them go first. */
export const BUSY_QUEUE_BYTES = 4 * 1024 * 1024
const YIELD_STEP_MS = 10
/** A site that is always busy still has to keep its limits. */
const LONGEST_YIELD_MS = 250

/** Holds promotion to a rate, and lets ingest go first for a while at each step. */
export class Pacer {
  readonly #options: PacerOptions
  #freeAtMs = 0

  constructor(options: PacerOptions) {
    this.#options = options
  }

  /** Waits until `bytes` more may be moved. @throws the signal's reason as Node gives it */
  async pace(bytes: number, signal: AbortSignal): Promise<void> {
    const { bytesPerSec, isBusy, monotonicMs = () => performance.now(), sleep = (ms, ending) => delay(ms, undefined, { signal: ending }) } = this.#options
    const nowMs = monotonicMs()
    this.#freeAtMs = Math.max(nowMs, this.#freeAtMs) + (bytes / bytesPerSec) * 1000
    if (this.#freeAtMs - nowMs >= 1) await sleep(this.#freeAtMs - nowMs, signal)
    for (let yieldedMs = 0; isBusy() && yieldedMs < LONGEST_YIELD_MS; yieldedMs += YIELD_STEP_MS) await sleep(YIELD_STEP_MS, signal)
  }
}
