import { readU64 } from '../../core/record/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import type { ExtentCursor, ExtentSource } from './extent-source.ts'
import type { FilePool } from './file-pool.ts'
import type { PageCache } from './page-cache.ts'
import {
  INNER_ENTRY_BYTES, INNER_MAGIC, LEAF_ENTRY_BYTES, LEAF_MAGIC, PAGE_BYTES, PAGE_ENTRIES_OFFSET, parseRunHeader, verifyPage,
} from './run-layout.ts'
import type { RunHeader } from './run-layout.ts'

/** Where a run stands: a file of its own, or a part of a segment. */
export type RunPlace = { path: string; offsetBytes: number; runBytes: number }

/** A run on disk. Pages come from the cache; each is checked when it is read. */
export class RunReader implements ExtentSource {
  readonly place: RunPlace
  readonly header: RunHeader
  readonly #files: FilePool
  readonly #cache: PageCache
  readonly #cacheKey: number

  private constructor(place: RunPlace, header: RunHeader, files: FilePool, cache: PageCache) {
    this.place = place
    this.header = header
    this.#files = files
    this.#cache = cache
    this.#cacheKey = cache.newReader()
  }

  /** @throws CdpError CHECKSUM or FORMAT if the header page is damaged, Node's error if the file cannot be read */
  static async open(place: RunPlace, files: FilePool, cache: PageCache): Promise<RunReader> {
    const page = Buffer.allocUnsafe(PAGE_BYTES)
    const bytes = await files.read(place.path, page, place.offsetBytes + place.runBytes - PAGE_BYTES)
    const header = parseRunHeader(page.subarray(0, bytes))
    if (header.pageCount * PAGE_BYTES !== place.runBytes) throw new CdpError('FORMAT', 'index run of another size than its header says', { context: { path: place.path } })
    return new RunReader(place, header, files, cache)
  }

  get firstSegment(): number {
    return this.header.firstSegment
  }

  get lastSegment(): number {
    return this.header.lastSegment
  }

  seek(cursor: ExtentCursor, key: number): boolean {
    cursor.nextPageKey = Infinity
    if (this.header.height === 0) {
      cursor.setNone()
      return true
    }
    let page = this.#page(cursor, this.header.rootPage)
    for (let level = 1; level < this.header.height; level++) {
      if (page === undefined) return false
      if (page.readUInt32LE(0) !== INNER_MAGIC) throw this.#wrongPage()
      page = this.#page(cursor, this.#child(cursor, page, key))
    }
    if (page === undefined) return false
    if (page.readUInt32LE(0) !== LEAF_MAGIC) throw this.#wrongPage()
    cursor.page = page
    this.#findInLeaf(cursor, page, key)
    return cursor.index < page.readUInt16LE(4) ? this.#set(cursor, page) : this.#nextPage(cursor)
  }

  next(cursor: ExtentCursor): boolean {
    const page = cursor.page
    if (page === undefined) return this.seek(cursor, cursor.endKey)
    cursor.index++
    return cursor.index < page.readUInt16LE(4) ? this.#set(cursor, page) : this.#nextPage(cursor)
  }

  async load(cursor: ExtentCursor): Promise<void> {
    const pageNumber = cursor.missingPage
    const page = Buffer.allocUnsafeSlow(PAGE_BYTES)
    const bytes = await this.#files.read(this.place.path, page, this.place.offsetBytes + pageNumber * PAGE_BYTES)
    verifyPage(page.subarray(0, bytes), pageNumber)
    this.#cache.put(this.#cacheKey + pageNumber, page)
    cursor.held.set(pageNumber, page)
  }

  #page(cursor: ExtentCursor, pageNumber: number): Buffer | undefined {
    const page = this.#cache.get(this.#cacheKey + pageNumber) ?? cursor.held.get(pageNumber)
    if (page === undefined) cursor.missingPage = pageNumber
    return page
  }

  /** Page number of the child that holds the last entry at or before `key`; notes where the page behind it begins. */
  #child(cursor: ExtentCursor, page: Buffer, key: number): number {
    const count = page.readUInt16LE(4)
    let low = 1
    let high = count
    while (low < high) {
      const middle = (low + high) >>> 1
      if (readU64(page, PAGE_ENTRIES_OFFSET + middle * INNER_ENTRY_BYTES) <= key) low = middle + 1
      else high = middle
    }
    if (low < count) cursor.nextPageKey = readU64(page, PAGE_ENTRIES_OFFSET + low * INNER_ENTRY_BYTES)
    const child = page.readUInt32LE(PAGE_ENTRIES_OFFSET + (low - 1) * INNER_ENTRY_BYTES + 8)
    if (child >= this.header.pageCount - 1) throw this.#wrongPage()
    return child
  }

  /** First entry of the leaf that ends behind `key`. */
  #findInLeaf(cursor: ExtentCursor, page: Buffer, key: number): void {
    const count = page.readUInt16LE(4)
    const delta = key - readU64(page, 8)
    let low = 0
    let high = count
    while (low < high) {
      const middle = (low + high) >>> 1
      const at = PAGE_ENTRIES_OFFSET + middle * LEAF_ENTRY_BYTES
      if (page.readUInt32LE(at) + page.readUInt16LE(at + 4) <= delta) low = middle + 1
      else high = middle
    }
    cursor.index = low
  }

  #nextPage(cursor: ExtentCursor): boolean {
    if (cursor.nextPageKey !== Infinity) return this.seek(cursor, cursor.nextPageKey)
    cursor.setNone()
    return true
  }

  #set(cursor: ExtentCursor, page: Buffer): boolean {
    const at = PAGE_ENTRIES_OFFSET + cursor.index * LEAF_ENTRY_BYTES
    cursor.startKey = readU64(page, 8) + page.readUInt32LE(at)
    cursor.endKey = cursor.startKey + page.readUInt16LE(at + 4)
    cursor.segment = readU64(page, 16) + page.readUInt16LE(at + 6)
    cursor.frame = page.readUInt32LE(at + 8)
    cursor.sector = page.readUInt16LE(at + 12)
    return true
  }

  #wrongPage(): CdpError {
    return new CdpError('CHECKSUM', 'index run whose pages contradict each other', { context: { path: this.place.path } })
  }
}
