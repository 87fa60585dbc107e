const EMPTY = Buffer.alloc(0)

/**
 * Collects a known number of bytes out of chunks of any size. The caller checks the length against its cap before `expect`.
 * Order of calls: expect, then feed until `complete`, then view.
 */
export class Gatherer {
  #buffer = EMPTY
  #neededBytes = 0
  #filledBytes = 0

  expect(lengthBytes: number): void {
    if (this.#buffer.length < lengthBytes) this.#buffer = Buffer.allocUnsafe(lengthBytes)
    this.#neededBytes = lengthBytes
    this.#filledBytes = 0
  }

  /** Copies what is missing, at most up to `end`. @returns the position behind the last byte taken */
  feed(chunk: Buffer, at: number, end: number): number {
    const take = Math.min(this.#neededBytes - this.#filledBytes, end - at)
    if (take <= 0) return at
    chunk.copy(this.#buffer, this.#filledBytes, at, at + take)
    this.#filledBytes += take
    return at + take
  }

  get complete(): boolean {
    return this.#filledBytes === this.#neededBytes
  }

  /** The bytes gathered; valid until the next `expect`. */
  view(): Buffer {
    return this.#buffer.subarray(0, this.#filledBytes)
  }
}
