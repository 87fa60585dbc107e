import { NbdClient } from '../../core/nbd/index.ts'

// A writer of several disks whose every instant can be told from the disks: write number n goes to the first disk, then to the second and so on,
// each only after the one before was acknowledged, at a place that follows from n, with n as its content.

const SLOT_BYTES = 64 * 1024
const STAMP_BYTES = 4096
const SLOTS = 96

export type StampTarget = { key: string; socketPath: string; exportName: string }

const stamp = (n: number): Buffer => {
  const block = Buffer.alloc(STAMP_BYTES)
  for (let at = 0; at < STAMP_BYTES; at += 512) block.writeDoubleLE(n, at)
  return block
}

const connect = ({ socketPath, exportName }: StampTarget): Promise<NbdClient> => NbdClient.connect({ path: socketPath }, { exportName })

export class StampWriter implements AsyncDisposable {
  /** Acknowledged on all disks. */
  acked = 0
  /** The longest that a write took. */
  longestMs = 0
  readonly #clients: NbdClient[]
  #running: Promise<void> | undefined
  #stop = false

  private constructor(clients: NbdClient[]) {
    this.#clients = clients
  }

  static async open(targets: readonly StampTarget[]): Promise<StampWriter> {
    return new StampWriter(await Promise.all(targets.map(connect)))
  }

  /** Writes until `pause`, so many numbers a second. */
  run(perSec: number): void {
    this.#stop = false
    this.#running = this.#write(perSec)
    this.#running.catch(() => undefined)
  }

  /** @throws what a write failed with since `run` */
  async pause(): Promise<void> {
    this.#stop = true
    await this.#running
  }

  /** Resolves when `count` more numbers are written; rejects if a write fails. */
  async more(count: number): Promise<void> {
    const until = this.acked + count
    while (this.acked < until) await Promise.race([this.#running, new Promise((resolve) => setTimeout(resolve, 5))])
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stop = true
    await this.#running?.catch(() => undefined)
    await Promise.all(this.#clients.map((client) => client[Symbol.asyncDispose]()))
  }

  async #write(perSec: number): Promise<void> {
    while (!this.#stop) {
      const n = this.acked + 1
      for (const client of this.#clients) {
        const startMs = performance.now()
        await client.write((n % SLOTS) * SLOT_BYTES, stamp(n))
        this.longestMs = Math.max(this.longestMs, performance.now() - startMs)
      }
      this.acked = n
      await new Promise((resolve) => setTimeout(resolve, 1000 / perSec))
    }
  }
}

/**
 * The highest number on each of these disks, in their order, after having checked that they are the content of one instant: each place holds the last number it was
 * given up to there, and no disk is ahead of the one before it.
 */
export const readInstant = async (targets: readonly StampTarget[]): Promise<number[]> => {
  const highest: number[] = []
  for (const target of targets) {
    await using client = await connect(target)
    const found = await Promise.all(Array.from({ length: SLOTS }, async (_, slot) => {
      const block = await client.read(slot * SLOT_BYTES, STAMP_BYTES)
      const n = block.readDoubleLE(0)
      if (!block.equals(stamp(n))) throw new Error(`${target.key}: the write at place ${slot} is torn`)
      return n
    }))
    const last = Math.max(...found)
    for (const [slot, n] of found.entries()) {
      const age = (((last - slot) % SLOTS) + SLOTS) % SLOTS
      const wanted = Math.max(0, last - age)
      if (n !== wanted) throw new Error(`${target.key}: place ${slot} holds ${n} and not ${wanted}, at the instant of ${last}`)
    }
    highest.push(last)
  }
  for (const [place, last] of highest.entries()) {
    const before = highest[place - 1] ?? last
    if (last > before || last < before - 1) throw new Error(`no instant of the writer: ${highest.join(', ')}`)
  }
  return highest
}
