import type { ExtentList } from './extent.ts'

/** Where a look-up stands in a source: one extent, or none (startKey Infinity). Reused for many look-ups. */
export class ExtentCursor {
  startKey = Infinity
  endKey = Infinity
  segment = 0
  frame = 0
  sector = 0
  /** Page that was missing when seek or next said false. */
  missingPage = 0
  /** Pages that this look-up had to wait for, by page number: they stay at hand even if the cache is too small for them. */
  readonly held = new Map<number, Buffer>()
  // Where a source stands; its own business.
  page: Buffer | undefined
  index = 0
  nextPageKey = Infinity

  setNone(): void {
    this.startKey = Infinity
    this.endKey = Infinity
  }

  /** Called when a cursor goes to another source. */
  reset(): void {
    this.held.clear()
    this.page = undefined
    this.setNone()
  }
}

/**
 * Sorted extents that do not overlap. `seek` and `next` are synchronous and say false if a page is not in memory: then
 * `load` it and call `seek` again.
 */
export interface ExtentSource {
  readonly firstSegment: number
  readonly lastSegment: number
  /** Moves to the first extent that ends behind `key`. */
  seek(cursor: ExtentCursor, key: number): boolean
  /** Moves to the next extent; on false go on with seek(endKey of the last one). */
  next(cursor: ExtentCursor): boolean
  load(cursor: ExtentCursor): Promise<void>
}

/** An extent list as a source: nothing is ever missing. */
export class ListSource implements ExtentSource {
  readonly firstSegment: number
  readonly lastSegment: number
  readonly #list: ExtentList

  constructor(list: ExtentList) {
    this.#list = list
    this.firstSegment = list.segment
    this.lastSegment = list.segment
  }

  seek(cursor: ExtentCursor, key: number): boolean {
    const { keys, lengths, count } = this.#list
    let low = 0
    let high = count
    while (low < high) {
      const middle = (low + high) >>> 1
      if (keys[middle] + lengths[middle] <= key) low = middle + 1
      else high = middle
    }
    cursor.index = low
    this.#set(cursor)
    return true
  }

  next(cursor: ExtentCursor): boolean {
    cursor.index++
    this.#set(cursor)
    return true
  }

  async load(): Promise<void> {}

  #set(cursor: ExtentCursor): void {
    const at = cursor.index
    const { keys, lengths, frames, sectors, count, segment } = this.#list
    if (at >= count) return cursor.setNone()
    cursor.startKey = keys[at]
    cursor.endKey = keys[at] + lengths[at]
    cursor.segment = segment
    cursor.frame = frames[at]
    cursor.sector = sectors[at]
  }
}
