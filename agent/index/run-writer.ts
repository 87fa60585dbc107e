import { writeU64 } from '../../core/record/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import { NO_DATA } from './extent.ts'
import {
  INNER_CAPACITY, INNER_ENTRY_BYTES, INNER_MAGIC, LEAF_CAPACITY, LEAF_ENTRY_BYTES, LEAF_MAGIC, MAX_ENTRY_SECTORS, MAX_SEGMENT_DELTA, MAX_START_DELTA,
  PAGE_BYTES, PAGE_ENTRIES_OFFSET, encodeRunHeader, sealPage,
} from './run-layout.ts'

type InnerLevel = { page: Buffer; count: number }

/** Takes finished pages in file order. The bytes are the sink's only during the call. */
export type PageSink = (page: Buffer) => void

/**
 * Writes a run from sorted extents that do not overlap, page by page, with memory for one page a level. An inner page is
 * written as soon as it is full, so leaf and inner pages alternate in the file.
 */
export class RunWriter {
  readonly #sink: PageSink
  readonly #leaf = Buffer.alloc(PAGE_BYTES)
  readonly #levels: InnerLevel[] = []
  readonly #keys = new Float64Array(LEAF_CAPACITY)
  readonly #lengths = new Uint32Array(LEAF_CAPACITY)
  readonly #segments = new Float64Array(LEAF_CAPACITY)
  readonly #frames = new Uint32Array(LEAF_CAPACITY)
  readonly #sectors = new Uint16Array(LEAF_CAPACITY)
  #count = 0
  #minSegment = 0
  #maxSegment = 0
  #entryCount = 0
  #pageCount = 0
  #endKey = 0

  constructor(sink: PageSink) {
    this.#sink = sink
  }

  /**
   * Adds an extent: `length` sectors from `key` on, whose data begin at `sector` of the frame at `frame` in `segment`.
   * @throws CdpError INTERNAL if it does not begin at or behind the end of the one before
   */
  add(key: number, length: number, segment: number, frame: number, sector: number): void {
    if (key < this.#endKey) throw new CdpError('INTERNAL', 'extents of a run must be sorted and must not overlap', { context: { key, endKey: this.#endKey } })
    this.#endKey = key + length
    while (length > MAX_ENTRY_SECTORS) {
      this.#append(key, MAX_ENTRY_SECTORS, segment, frame, sector)
      key += MAX_ENTRY_SECTORS
      length -= MAX_ENTRY_SECTORS
      if (sector !== NO_DATA) sector += MAX_ENTRY_SECTORS
    }
    this.#append(key, length, segment, frame, sector)
  }

  /** Writes what is left and the header page. */
  finish(covers: { firstSegment: number; lastSegment: number; lastSeq: number }): { entryCount: number; runBytes: number } {
    this.#flushLeaf()
    let rootPage = 0
    let height = 0
    if (this.#pageCount > 0) {
      height = 1
      for (let level = 0; level < this.#levels.length; level++) {
        const { page, count } = this.#levels[level]
        const isTop = level === this.#levels.length - 1
        if (isTop && count === 1) {
          rootPage = page.readUInt32LE(PAGE_ENTRIES_OFFSET + 8)
          break
        }
        height++
        if (isTop) {
          this.#writeInner(level)
          rootPage = this.#pageCount - 1
        } else if (count > 0) {
          this.#flushInner(level)
        }
      }
    }
    const pageCount = this.#pageCount + 1
    this.#sink(encodeRunHeader({ height, entryCount: this.#entryCount, rootPage, pageCount, ...covers }))
    return { entryCount: this.#entryCount, runBytes: pageCount * PAGE_BYTES }
  }

  #append(key: number, length: number, segment: number, frame: number, sector: number): void {
    const last = this.#count - 1
    if (last >= 0) {
      if (this.#joins(last, key, length, segment, frame, sector)) {
        this.#lengths[last] += length
        return
      }
      const spread = Math.max(this.#maxSegment, segment) - Math.min(this.#minSegment, segment)
      if (this.#count === LEAF_CAPACITY || key - this.#keys[0] > MAX_START_DELTA || spread > MAX_SEGMENT_DELTA) this.#flushLeaf()
    }
    const at = this.#count++
    this.#minSegment = at === 0 ? segment : Math.min(this.#minSegment, segment)
    this.#maxSegment = at === 0 ? segment : Math.max(this.#maxSegment, segment)
    this.#keys[at] = key
    this.#lengths[at] = length
    this.#segments[at] = segment
    this.#frames[at] = sector === NO_DATA ? 0 : frame
    this.#sectors[at] = sector
  }

  #joins(last: number, key: number, length: number, segment: number, frame: number, sector: number): boolean {
    if (this.#keys[last] + this.#lengths[last] !== key || this.#lengths[last] + length > MAX_ENTRY_SECTORS || this.#segments[last] !== segment) return false
    if (sector === NO_DATA) return this.#sectors[last] === NO_DATA
    return this.#sectors[last] !== NO_DATA && this.#frames[last] === frame && this.#sectors[last] + this.#lengths[last] === sector
  }

  #flushLeaf(): void {
    if (this.#count === 0) return
    const page = this.#leaf
    page.fill(0)
    page.writeUInt32LE(LEAF_MAGIC, 0)
    page.writeUInt16LE(this.#count, 4)
    const baseKey = this.#keys[0]
    writeU64(page, baseKey, 8)
    writeU64(page, this.#minSegment, 16)
    let at = PAGE_ENTRIES_OFFSET
    for (let index = 0; index < this.#count; index++) {
      page.writeUInt32LE(this.#keys[index] - baseKey, at)
      page.writeUInt16LE(this.#lengths[index], at + 4)
      page.writeUInt16LE(this.#segments[index] - this.#minSegment, at + 6)
      page.writeUInt32LE(this.#frames[index], at + 8)
      page.writeUInt16LE(this.#sectors[index], at + 12)
      at += LEAF_ENTRY_BYTES
    }
    this.#entryCount += this.#count
    this.#count = 0
    this.#emit(page)
    this.#addChild(0, baseKey, this.#pageCount - 1)
  }

  #addChild(level: number, key: number, pageNumber: number): void {
    if (level === this.#levels.length) this.#levels.push({ page: Buffer.alloc(PAGE_BYTES), count: 0 })
    const inner = this.#levels[level]
    if (inner.count === INNER_CAPACITY) this.#flushInner(level)
    const at = PAGE_ENTRIES_OFFSET + inner.count * INNER_ENTRY_BYTES
    writeU64(inner.page, key, at)
    inner.page.writeUInt32LE(pageNumber, at + 8)
    inner.count++
  }

  #flushInner(level: number): void {
    const { page } = this.#levels[level]
    const baseKey = page.readUInt32LE(PAGE_ENTRIES_OFFSET) + page.readUInt32LE(PAGE_ENTRIES_OFFSET + 4) * 0x1_0000_0000
    this.#writeInner(level)
    this.#addChild(level + 1, baseKey, this.#pageCount - 1)
  }

  #writeInner(level: number): void {
    const inner = this.#levels[level]
    const { page, count } = inner
    page.writeUInt32LE(INNER_MAGIC, 0)
    page.writeUInt16LE(count, 4)
    page.writeUInt16LE(level + 1, 6)
    page.copy(page, 8, PAGE_ENTRIES_OFFSET, PAGE_ENTRIES_OFFSET + 8)
    page.fill(0, PAGE_ENTRIES_OFFSET + count * INNER_ENTRY_BYTES)
    this.#emit(page)
    inner.count = 0
  }

  #emit(page: Buffer): void {
    sealPage(page)
    this.#pageCount++
    this.#sink(page)
  }
}
