/**
 * Page-aligned buffers of one size, used again. `take` never fails: the bound on memory is the frame queue's budget, the pool only
 * bounds how many *free* slabs it keeps.
 */
export class SlabPool {
  readonly slabBytes: number
  readonly #free: Buffer[] = []
  readonly #maxFree: number

  constructor(slabBytes: number, maxFreeBytes: number) {
    this.slabBytes = slabBytes
    this.#maxFree = Math.max(1, Math.floor(maxFreeBytes / slabBytes))
  }

  take(): Buffer {
    return this.#free.pop() ?? Buffer.allocUnsafeSlow(this.slabBytes)
  }

  give(slab: Buffer): void {
    if (this.#free.length < this.#maxFree) this.#free.push(slab)
  }
}
