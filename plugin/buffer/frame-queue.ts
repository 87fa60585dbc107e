import { CdpError } from '../../core/errors/index.ts'
import type { SealedFrame } from '../../core/record/index.ts'
import type { SlabPool } from './slab-pool.ts'

/** A frame that waits for its durable acknowledgement, and the slab (if any) that goes back to its pool then. */
export type QueuedFrame = SealedFrame & { slab?: Buffer; pool?: SlabPool }

/** What the sender sees of a queue. */
export type SendQueue = {
  /** The next frame to send, or undefined; moves the cursor. */
  next(): QueuedFrame | undefined
  /** Everything up to `durableSeq` is safe at the agent. */
  release(durableSeq: number): void
  /** Everything that is not durable is sent again. */
  rewind(durableSeq: number): void
}

/** Bytes of memory that a queued frame holds: its slab counts whole, however little of it is used. */
const heldBytesOf = (frame: QueuedFrame): number => (frame.slab === undefined ? frame.lengthBytes : frame.head.length + frame.slab.length)

/**
 * Frames in order of sequence, from the first one that is not durable at the agent to the newest. The sender walks it with a
 * cursor; `release` lets go of what is durable; `rewind` makes the sender begin again after a reconnect.
 */
export class FrameQueue implements SendQueue {
  /** Below #head: undefined, so that what was released is not kept alive by its place. */
  #frames: (QueuedFrame | undefined)[] = []
  #head = 0
  #cursor = 0
  #heldBytes = 0
  #peakBytes = 0
  #releasedBytes = 0
  #lastSeq: number
  onPush: () => void = () => undefined

  /** @param lastSeq the sequence that comes before the first frame */
  constructor(lastSeq = 0) {
    this.#lastSeq = lastSeq
  }

  get heldBytes(): number {
    return this.#heldBytes
  }

  get peakBytes(): number {
    return this.#peakBytes
  }

  /** What was held and is released, in all. */
  get releasedBytes(): number {
    return this.#releasedBytes
  }

  get length(): number {
    return this.#frames.length - this.#head
  }

  push(frame: QueuedFrame): void {
    if (frame.firstSeq !== this.#lastSeq + 1) throw new CdpError('INTERNAL', 'frame queue would get a gap', { context: { lastSeq: this.#lastSeq, firstSeq: frame.firstSeq } })
    this.#lastSeq = frame.lastSeq
    this.#frames.push(frame)
    this.#heldBytes += heldBytesOf(frame)
    if (this.#heldBytes > this.#peakBytes) this.#peakBytes = this.#heldBytes
    this.onPush()
  }

  /** The next frame to send, or undefined; moves the cursor. */
  next(): QueuedFrame | undefined {
    return this.#cursor < this.#frames.length ? this.#frames[this.#cursor++] : undefined
  }

  /** Everything up to `durableSeq` is safe at the agent. */
  release(durableSeq: number): void {
    for (let frame = this.#frames[this.#head]; frame !== undefined && frame.lastSeq <= durableSeq; frame = this.#frames[this.#head]) {
      const bytes = heldBytesOf(frame)
      this.#heldBytes -= bytes
      this.#releasedBytes += bytes
      if (frame.slab !== undefined) frame.pool?.give(frame.slab)
      this.#frames[this.#head++] = undefined
    }
    if (this.#cursor < this.#head) this.#cursor = this.#head
    if (this.#head > 64 && this.#head * 2 > this.#frames.length) {
      this.#frames = this.#frames.slice(this.#head)
      this.#cursor -= this.#head
      this.#head = 0
    }
  }

  /** Everything that is not durable is sent again. */
  rewind(durableSeq: number): void {
    this.release(durableSeq)
    this.#cursor = this.#head
  }

  /** Forgets all frames; the next one has sequence `lastSeq + 1`. Slabs are left to the collector: a socket may still read them. */
  clear(lastSeq: number): void {
    this.#frames = []
    this.#head = 0
    this.#cursor = 0
    this.#heldBytes = 0
    this.#lastSeq = lastSeq
  }
}
