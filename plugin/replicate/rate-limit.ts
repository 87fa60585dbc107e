const UNIT_BYTES = 1024

/** One VM's share of the line, written by the main thread and read by the capture worker: a word of shared memory. */
export class RateCell {
  readonly buffer: SharedArrayBuffer
  readonly #word: Int32Array

  constructor(buffer = new SharedArrayBuffer(4)) {
    this.buffer = buffer
    this.#word = new Int32Array(buffer)
  }

  /** Bytes per second; 0: no limit. What is set is rounded up to whole KiB. */
  get bytesPerSec(): number {
    return Atomics.load(this.#word, 0) * UNIT_BYTES
  }

  set bytesPerSec(rate: number) {
    Atomics.store(this.#word, 0, Math.min(0x7fff_ffff, Math.ceil(rate / UNIT_BYTES)))
  }
}

/** What may be saved up while nothing is sent. */
const BURST_MS = 100
/** The rate may change meanwhile, so nobody waits longer before he asks again. */
const MAX_WAIT_MS = 1_000

/** Token bucket over a rate that may change at any time. A frame may go when there is no debt, and puts its bytes there. */
export class RateLimit {
  readonly #cell: RateCell
  readonly #nowMs: () => number
  #credit = 0
  #countedMs: number

  /** @param nowMs monotonic */
  constructor(cell: RateCell, nowMs: () => number = () => performance.now()) {
    this.#cell = cell
    this.#nowMs = nowMs
    this.#countedMs = nowMs()
  }

  /** How long to wait before the next frame, in whole ms; 0: it may go now. */
  waitMs(): number {
    const { bytesPerSec } = this.#cell
    const nowMs = this.#nowMs()
    const passedMs = nowMs - this.#countedMs
    this.#countedMs = nowMs
    if (bytesPerSec === 0) {
      this.#credit = 0
      return 0
    }
    this.#credit = Math.min((bytesPerSec * BURST_MS) / 1000, this.#credit + (bytesPerSec * passedMs) / 1000)
    return this.#credit >= 0 ? 0 : Math.min(MAX_WAIT_MS, Math.ceil((-this.#credit / bytesPerSec) * 1000))
  }

  /** So many bytes go now. */
  spend(lengthBytes: number): void {
    this.#credit -= lengthBytes
  }
}
