const SMALLEST_BYTES = 4096

/**
 * Buffers for frames on their way from the socket to the disk, used again: a frame is short-lived and large, and giving each its own
 * memory costs the collector more than everything else that is done with it. Sizes are powers of two; what is kept free is bounded.
 */
export class FrameBuffers {
  readonly #maxFreeBytes: number
  readonly #free = new Map<number, Buffer[]>()
  #freeBytes = 0

  constructor(maxFreeBytes: number) {
    this.#maxFreeBytes = maxFreeBytes
  }

  /** Exactly `lengthBytes`, with whatever was in them before. */
  take(lengthBytes: number): Buffer {
    const size = Math.max(SMALLEST_BYTES, 2 ** Math.ceil(Math.log2(lengthBytes)))
    const whole = this.#free.get(size)?.pop()
    if (whole !== undefined) this.#freeBytes -= size
    return (whole ?? Buffer.allocUnsafeSlow(size)).subarray(0, lengthBytes)
  }

  /** Nobody looks at `buffer`, which came from `take`, any more. */
  give(buffer: Buffer): void {
    const size = buffer.buffer.byteLength
    if (this.#freeBytes + size > this.#maxFreeBytes) return
    const list = this.#free.get(size)
    const whole = Buffer.from(buffer.buffer)
    if (list === undefined) this.#free.set(size, [whole])
    else list.push(whole)
    this.#freeBytes += size
  }
}
