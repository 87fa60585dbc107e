import { readSync } from 'node:fs'
import { readU64 } from '../../core/record/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import type { ExtentList } from './extent.ts'
import { INNER_MAGIC, LEAF_ENTRY_BYTES, LEAF_MAGIC, PAGE_BYTES, PAGE_ENTRIES_OFFSET, verifyPage } from './run-layout.ts'

/** A sorted stream of extents under a cursor; key Infinity at the end. Synchronous: merging has a thread of its own. */
export interface MergeInput {
  key: number
  endKey: number
  segment: number
  frame: number
  sector: number
  advance(): void
}

const READ_AHEAD_PAGES = 32

/** Leaf pages of a run in file order, with a buffer of 128 KiB; every page is checked. */
export class RunInput implements MergeInput {
  key = -1
  endKey = -1
  segment = 0
  frame = 0
  sector = 0
  readonly #fd: number
  readonly #path: string
  readonly #buffer = Buffer.allocUnsafeSlow(READ_AHEAD_PAGES * PAGE_BYTES)
  #offsetBytes: number
  #pagesLeft: number
  #nextPage = 0
  #pages = 0
  #page: Buffer = this.#buffer
  #index = 0
  #count = 0
  #pageNumber = 0

  /** @param pageCount pages without the header page */
  constructor(fd: number, path: string, offsetBytes: number, pageCount: number) {
    this.#fd = fd
    this.#path = path
    this.#offsetBytes = offsetBytes
    this.#pagesLeft = pageCount
    this.advance()
  }

  advance(): void {
    while (this.#index === this.#count) {
      if (!this.#readPage()) {
        this.key = Infinity
        this.endKey = Infinity
        return
      }
    }
    const page = this.#page
    const at = PAGE_ENTRIES_OFFSET + this.#index++ * LEAF_ENTRY_BYTES
    const key = readU64(page, 8) + page.readUInt32LE(at)
    if (key < this.endKey) throw this.#damaged('extents out of order')
    this.key = key
    this.endKey = key + page.readUInt16LE(at + 4)
    this.segment = readU64(page, 16) + page.readUInt16LE(at + 6)
    this.frame = page.readUInt32LE(at + 8)
    this.sector = page.readUInt16LE(at + 12)
  }

  #readPage(): boolean {
    if (this.#nextPage === this.#pages) {
      if (this.#pagesLeft === 0) return false
      this.#pages = Math.min(READ_AHEAD_PAGES, this.#pagesLeft)
      const bytes = readSync(this.#fd, this.#buffer, 0, this.#pages * PAGE_BYTES, this.#offsetBytes)
      if (bytes !== this.#pages * PAGE_BYTES) throw this.#damaged('run is cut short')
      this.#offsetBytes += bytes
      this.#pagesLeft -= this.#pages
      this.#nextPage = 0
    }
    const page = this.#buffer.subarray(this.#nextPage * PAGE_BYTES, (this.#nextPage + 1) * PAGE_BYTES)
    this.#nextPage++
    verifyPage(page, this.#pageNumber++)
    const magic = page.readUInt32LE(0)
    this.#index = 0
    this.#count = magic === LEAF_MAGIC ? page.readUInt16LE(4) : 0
    this.#page = page
    if (magic !== LEAF_MAGIC && magic !== INNER_MAGIC) throw this.#damaged('header page in the middle')
    return true
  }

  #damaged(what: string): CdpError {
    return new CdpError('CHECKSUM', `index run is damaged: ${what}`, { context: { path: this.#path } })
  }
}

/** Extents in memory as an input. */
export class ListInput implements MergeInput {
  key = Infinity
  endKey = Infinity
  readonly segment: number
  frame = 0
  sector = 0
  readonly #list: ExtentList
  #index = 0

  constructor(list: ExtentList) {
    this.#list = list
    this.segment = list.segment
    this.advance()
  }

  advance(): void {
    const at = this.#index++
    const { keys, lengths, frames, sectors, count } = this.#list
    this.key = at < count ? keys[at] : Infinity
    this.endKey = at < count ? keys[at] + lengths[at] : Infinity
    this.frame = frames[at]
    this.sector = sectors[at]
  }
}
