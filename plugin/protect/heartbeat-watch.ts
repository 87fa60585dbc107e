import type { CaptureWorker } from '../capture/index.ts'

const HUNG_MS = 1_000
/** Together with the watchdog's own limit below 2 s. */
const SUSPICIOUS_MS = 600

/** Watches over a capture worker's heartbeat. A worker that hangs would hang the guest. */
export class HeartbeatWatch {
  #worker: CaptureWorker | undefined
  #lastBeat = -1
  #lastBeatMs = 0
  #lastCheckMs = 0

  /** Another worker, whose first beat is still to come. */
  begin(worker: CaptureWorker): void {
    this.#worker = worker
    this.#lastBeat = -1
  }

  /** No sign of life for a while: it is ended soon; if that does not help, the watchdog ends the plugin. */
  get hangs(): boolean {
    return this.#worker !== undefined && !this.#worker.exited && this.#lastBeat !== -1 && performance.now() - this.#lastBeatMs > SUSPICIOUS_MS
  }

  /** Called several times a second. True if the worker has to be ended: QEMU lets go then. */
  check(): boolean {
    const worker = this.#worker
    if (worker === undefined || worker.exited) return false
    const nowMs = performance.now()
    // Who was held up himself (SIGSTOP, a suspended host) cannot tell whether the worker was.
    const heldUp = nowMs - this.#lastCheckMs > HUNG_MS / 2
    this.#lastCheckMs = nowMs
    if (worker.beat === this.#lastBeat && !heldUp) return nowMs - this.#lastBeatMs > HUNG_MS
    this.#lastBeat = worker.beat
    this.#lastBeatMs = nowMs
    return false
  }
}
