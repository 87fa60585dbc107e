/**
 * Page-aligned buffers of one size, used again. `take` never fails: the bound on memory is the frame queue's budget, the pool only
 * bounds how many *free* slabs it keeps, and `trim` lets go of those that nobody needed for a while.
 */
export class SlabPool {
  readonly slabBytes: number
  readonly #free: Buffer[] = []
  readonly #maxFree: number
  /** Fewest free ones since the last trim: so many were not needed. */
  #fewestFree = 0

  constructor(slabBytes: number, maxFreeBytes: number) {
    this.slabBytes = slabBytes
    this.#maxFree = Math.max(1, Math.floor(maxFreeBytes / slabBytes))
  }

  take(): Buffer {
    const slab = this.#free.pop()
    if (this.#free.length < this.#fewestFree) this.#fewestFree = this.#free.length
    return slab ?? Buffer.allocUnsafeSlow(this.slabBytes)
  }

  give(slab: Buffer): void {
    if (this.#free.length < this.#maxFree) this.#free.push(slab)
  }

  get freeBytes(): number {
    return this.#free.length * this.slabBytes
  }

  /** Frees the slabs that were not needed since the last call, at once: an idle thread may not collect garbage for hours. */
  trim(): void {
    for (const slab of this.#free.splice(0, this.#fewestFree)) if (slab.buffer instanceof ArrayBuffer) slab.buffer.transfer(0)
    this.#fewestFree = this.#free.length
  }
}
