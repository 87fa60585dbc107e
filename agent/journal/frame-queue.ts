import type { Frame } from '../../core/record/index.ts'
import type { JournalMark } from './frame-checks.ts'

/** A frame that was checked and waits to be made durable. */
export type QueuedFrame = {
  bytes: Buffer
  frame: Frame
  marks: JournalMark[] | undefined
  direct: boolean
  /** Carries the syncEnd of the initial sync. */
  endsBase: boolean
}

/** Frames in order of sequence, counted in bytes; what was taken counts until `release`. */
export class FrameQueue {
  #frames: (QueuedFrame | undefined)[] = []
  #head = 0
  #bytes = 0

  /** Bytes of what waits and of what was taken and not released. */
  get bytes(): number {
    return this.#bytes
  }

  get length(): number {
    return this.#frames.length - this.#head
  }

  push(frame: QueuedFrame): void {
    this.#frames.push(frame)
    this.#bytes += frame.bytes.length
  }

  peek(): QueuedFrame | undefined {
    return this.#frames[this.#head]
  }

  take(): QueuedFrame | undefined {
    if (this.#head === this.#frames.length) return undefined
    const frame = this.#frames[this.#head]
    // Taken bytes must not live on in the queue.
    this.#frames[this.#head++] = undefined
    if (this.#head === this.#frames.length) {
      this.#frames = []
      this.#head = 0
    } else if (this.#head >= 1024) {
      this.#frames = this.#frames.slice(this.#head)
      this.#head = 0
    }
    return frame
  }

  release(lengthBytes: number): void {
    this.#bytes -= lengthBytes
  }

  /** Forgets everything: nobody was told that it is durable. */
  clear(): void {
    this.#frames = []
    this.#head = 0
    this.#bytes = 0
  }
}
