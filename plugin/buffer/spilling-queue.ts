import { errorMessage } from '../../core/errors/index.ts'
import type { SealedFrame } from '../../core/record/index.ts'
import { FrameQueue } from './frame-queue.ts'
import type { QueuedFrame, SendQueue } from './frame-queue.ts'
import type { SpillOutcome } from './spill-file.ts'

/** Where frames overflow to; SpillFile. One operation at a time. */
export type Spill = {
  readonly bytes: number
  append(frames: readonly SealedFrame[]): Promise<SpillOutcome>
  take(): Promise<SealedFrame[]>
  clear(): Promise<void>
}

export type SpillingQueueOptions = {
  /** Without one everything stays in memory. */
  spill?: Spill
  /** Spilling begins when memory holds so much. */
  startBytes: number
  /** Frames that are in the spill are lost to us: nothing behind them can be sent any more. */
  onFailed: (why: string) => void
}

const WRITE_BYTES = 8 * 1024 * 1024

/**
 * Frames in order of sequence, from the first that is not durable at the agent to the newest: head (memory) - spill (files) - tail (memory). Without
 * an overflow only the head is used. The sender sees one queue; see FrameQueue for what its calls mean.
 */
export class SpillingQueue implements SendQueue {
  readonly #options: SpillingQueueOptions
  readonly #head = new FrameQueue()
  readonly #tail = new FrameQueue()
  #spilling = false
  #busy = false
  #full: string | undefined
  #failed = false
  /** What is in the files, or on its way there, is from before the last `clear`. */
  #stale = false
  #generation = 0
  #peakBytes = 0
  onPush: () => void = () => undefined

  constructor(options: SpillingQueueOptions) {
    this.#options = options
  }

  /** Bytes of memory. */
  get heldBytes(): number {
    return this.#head.heldBytes + this.#tail.heldBytes
  }

  /** Of `heldBytes`, what was let go because it is durable at the agent; only grows. */
  get durableBytes(): number {
    return this.#head.releasedBytes
  }

  get peakBytes(): number {
    return this.#peakBytes
  }

  /** Bytes in files. */
  get spilledBytes(): number {
    return this.#spilling && !this.#stale ? (this.#options.spill?.bytes ?? 0) : 0
  }

  /** Frames take, or are about to take, the way over the files. */
  get spilling(): boolean {
    return this.#spilling
  }

  /** Why the files take no more, while that is so. */
  get whyFull(): string | undefined {
    return this.#full
  }

  /** Nothing waits for the agent. */
  get isEmpty(): boolean {
    return this.#head.length === 0 && (!this.#spilling || this.#failed)
  }

  push(frame: QueuedFrame): void {
    if (this.#failed) return
    const { spill, startBytes } = this.#options
    if (!this.#spilling && spill !== undefined && this.#head.length > 0 && this.#head.heldBytes + frame.lengthBytes > startBytes) {
      this.#spilling = true
      this.#tail.clear(frame.firstSeq - 1)
    }
    if (this.#spilling) this.#tail.push(frame)
    else this.#head.push(frame)
    if (this.heldBytes > this.#peakBytes) this.#peakBytes = this.heldBytes
    this.#work()
    this.onPush()
  }

  next(): QueuedFrame | undefined {
    return this.#head.next()
  }

  release(durableSeq: number): void {
    this.#head.release(durableSeq)
    this.#work()
  }

  rewind(durableSeq: number): void {
    this.#head.rewind(durableSeq)
    this.#work()
  }

  clear(lastSeq: number): void {
    this.#generation++
    this.#stale ||= this.#busy || (this.#options.spill?.bytes ?? 0) > 0
    this.#head.clear(lastSeq)
    this.#tail.clear(lastSeq)
    this.#spilling = false
    this.#failed = false
    this.#full = undefined
    this.#work()
  }

  /** Begins what is to be done with the files, if nothing is under way: memory is relieved first, then the sender is fed. */
  #work(): void {
    const { spill, startBytes } = this.#options
    if (spill === undefined || this.#busy || this.#failed) return
    const wantsMore = this.#head.heldBytes < startBytes / 2
    if (this.#stale) {
      this.#run(() => spill.clear(), () => (this.#stale = false))
    } else if (!this.#spilling) {
      return
    } else if (spill.bytes === 0 && wantsMore) {
      this.#joinTail()
    } else if (this.#full === undefined && this.#tail.length > 0 && !(wantsMore && this.#tail.heldBytes < WRITE_BYTES)) {
      const frames = this.#batch()
      this.#run(() => spill.append(frames), (outcome) => {
        if (outcome.is === 'full') this.#full = outcome.why
        else this.#tail.release(frames[frames.length - 1].lastSeq)
      })
    } else if (wantsMore) {
      this.#run(() => spill.take(), (frames) => {
        this.#full = undefined
        for (const frame of frames) this.#head.push(frame)
        this.onPush()
      })
    }
  }

  /** Nothing is in the files: memory goes on alone. */
  #joinTail(): void {
    this.#spilling = false
    this.#full = undefined
    this.#tail.rewind(0)
    for (let frame = this.#tail.next(); frame !== undefined; frame = this.#tail.next()) this.#head.push(frame)
    this.#tail.clear(0)
    this.onPush()
  }

  #batch(): QueuedFrame[] {
    const frames: QueuedFrame[] = []
    let lengthBytes = 0
    this.#tail.rewind(0)
    for (let frame = this.#tail.next(); frame !== undefined && (lengthBytes === 0 || lengthBytes + frame.lengthBytes <= WRITE_BYTES); frame = this.#tail.next()) {
      frames.push(frame)
      lengthBytes += frame.lengthBytes
    }
    return frames
  }

  #run<T>(operation: () => Promise<T>, done: (result: T) => void): void {
    const generation = this.#generation
    this.#busy = true
    operation().then(
      (result) => {
        this.#busy = false
        if (generation === this.#generation) done(result)
        this.#work()
      },
      (error: unknown) => {
        this.#busy = false
        if (generation === this.#generation && this.#spilling) this.#fail(errorMessage(error))
      },
    )
  }

  #fail(why: string): void {
    this.#failed = true
    this.#tail.clear(0)
    this.#options.onFailed(why)
  }
}
