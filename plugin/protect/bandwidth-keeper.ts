import { divide, limitAt } from '../replicate/index.ts'
import type { Bandwidth, RateCell } from '../replicate/index.ts'

export type Priority = 'low' | 'normal' | 'high'

/** A VM of this node, as far as the line matters. `sentBytes` only grows, over one life of its capture; `waitingBytes` are captured and not at the agent. */
export type LineUser = { rate: RateCell; priority: Priority; sentBytes: number; waitingBytes: number }

const WEIGHTS: Record<Priority, number> = { low: 1, normal: 2, high: 4 }
const EVERY_MS = 1_000

/** Divides the node's limit of bandwidth among its VMs, once a second (docs/decisions/bandwidth.md). */
export class BandwidthKeeper implements Disposable {
  readonly #bandwidth: Bandwidth
  readonly #users: () => readonly LineUser[]
  readonly #nowUnixMs: () => number
  readonly #sentBefore = new WeakMap<RateCell, number>()
  #timer: NodeJS.Timeout | undefined

  constructor(options: { bandwidth: Bandwidth; users: () => readonly LineUser[]; nowUnixMs?: () => number }) {
    this.#bandwidth = options.bandwidth
    this.#users = options.users
    this.#nowUnixMs = options.nowUnixMs ?? Date.now
  }

  start(): void {
    this.divide()
    this.#timer = setInterval(() => this.divide(), EVERY_MS)
  }

  /** What holds now, for everybody who is there now. */
  divide(): void {
    const users = this.#users()
    const limitBytesPerSec = limitAt(this.#bandwidth, new Date(this.#nowUnixMs()))
    if (users.length === 0) return
    if (limitBytesPerSec === 0) {
      for (const { rate } of users) rate.bytesPerSec = 0
      return
    }
    const shares = divide(limitBytesPerSec, users.map((user) => ({ weight: WEIGHTS[user.priority], bytesPerSec: this.#neededBytesPerSec(user) })))
    for (const [at, { rate }] of users.entries()) rate.bytesPerSec = Math.max(1, shares[at])
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer)
  }

  /** What it sent since the last look and what waits: all of it, within the next second. */
  #neededBytesPerSec({ rate, sentBytes, waitingBytes }: LineUser): number {
    const before = this.#sentBefore.get(rate) ?? sentBytes
    this.#sentBefore.set(rate, sentBytes)
    return (Math.max(0, sentBytes - before) + waitingBytes) * (1000 / EVERY_MS)
  }
}
