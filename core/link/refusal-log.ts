import type { Logger } from '../log/index.ts'

const windowMs = 10_000
const linesPerWindow = 20

/** Counts refused connections by reason, and logs them: at most 20 lines in 10 s, so that a port scan fills no disk; the rest is told as a number. */
export class RefusalLog<Reason extends string> {
  readonly #log: Logger
  readonly #nowMs: () => number
  readonly #counts = new Map<Reason, number>()
  #windowStartMs = Number.NEGATIVE_INFINITY
  #linesInWindow = 0
  #suppressed = 0

  constructor(log: Logger, nowMs: () => number = () => performance.now()) {
    this.#log = log
    this.#nowMs = nowMs
  }

  refuse(reason: Reason, fields: { address: string | undefined; port: number | undefined; detail?: string }): void {
    this.#counts.set(reason, (this.#counts.get(reason) ?? 0) + 1)
    const nowMs = this.#nowMs()
    if (nowMs - this.#windowStartMs >= windowMs) {
      this.#windowStartMs = nowMs
      this.#linesInWindow = 0
    }
    if (this.#linesInWindow >= linesPerWindow) {
      this.#suppressed += 1
      return
    }
    this.#linesInWindow += 1
    this.#log.warn('connection refused', { reason, ...fields, ...(this.#suppressed > 0 ? { notLoggedBefore: this.#suppressed } : {}) })
    this.#suppressed = 0
  }

  counts(): Partial<Record<Reason, number>> {
    return Object.fromEntries(this.#counts) as Partial<Record<Reason, number>>
  }
}
