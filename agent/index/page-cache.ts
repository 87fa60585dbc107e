import { PAGE_BYTES } from './run-layout.ts'

type Slot = { key: number; page: Buffer; used: boolean }

/**
 * Pages of all runs of the agent, bounded in bytes. Replacement is by clock: a hit costs one Map look-up. A page handed
 * out stays valid for who holds it, also after it was replaced.
 */
export class PageCache {
  /** Pages it holds at most. */
  readonly capacityPages: number
  readonly #slots: Slot[] = []
  readonly #byKey = new Map<number, Slot>()
  #hand = 0
  #nextReader = 0
  hits = 0
  misses = 0

  constructor(maxBytes: number) {
    this.capacityPages = Math.max(1, Math.floor(maxBytes / PAGE_BYTES))
  }

  get sizeBytes(): number {
    return this.#slots.length * PAGE_BYTES
  }

  /** First key of a new reader's range of keys; page n of it has that plus n. */
  newReader(): number {
    return this.#nextReader++ * 0x1_0000_0000
  }

  get(key: number): Buffer | undefined {
    const slot = this.#byKey.get(key)
    if (slot === undefined) {
      this.misses++
      return undefined
    }
    this.hits++
    slot.used = true
    return slot.page
  }

  put(key: number, page: Buffer): void {
    const present = this.#byKey.get(key)
    if (present !== undefined) {
      present.page = page
      return
    }
    if (this.#slots.length < this.capacityPages) {
      const slot = { key, page, used: false }
      this.#slots.push(slot)
      this.#byKey.set(key, slot)
      return
    }
    while (this.#slots[this.#hand].used) {
      this.#slots[this.#hand].used = false
      this.#hand = (this.#hand + 1) % this.capacityPages
    }
    const victim = this.#slots[this.#hand]
    this.#hand = (this.#hand + 1) % this.capacityPages
    this.#byKey.delete(victim.key)
    victim.key = key
    victim.page = page
    this.#byKey.set(key, victim)
  }
}
