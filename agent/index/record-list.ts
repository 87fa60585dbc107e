import { SECTOR_BYTES, hasData, hasRange } from '../../core/record/index.ts'
import type { RecordTable } from '../../core/record/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import { NO_DATA, checkDisk, keyOfBytes } from './extent.ts'
import type { ExtentList } from './extent.ts'
import { newestWins } from './newest-wins.ts'

/**
 * The ranges of one segment's records in sequence order, 22 bytes each in typed arrays: what a leaf run is built from and
 * what answers "as of sequence s" for a segment that is not sealed yet. Frames are added in order.
 */
export class RecordList {
  readonly segment: number
  /** Sequence of the segment's first record. */
  readonly firstSeq: number
  /** Sequence of the last record added, with or without a range; firstSeq - 1 while there is none. */
  lastSeq: number
  /** Records that change a range. */
  count = 0
  keys: Float64Array
  lengths: Uint32Array
  frames: Uint32Array
  sectors: Uint16Array
  #seqDeltas: Uint32Array

  constructor(segment: number, firstSeq: number, capacity = 1024) {
    this.segment = segment
    this.firstSeq = firstSeq
    this.lastSeq = firstSeq - 1
    this.keys = new Float64Array(capacity)
    this.lengths = new Uint32Array(capacity)
    this.frames = new Uint32Array(capacity)
    this.sectors = new Uint16Array(capacity)
    this.#seqDeltas = new Uint32Array(capacity)
  }

  /**
   * Adds the records of one frame, those up to `maxSeq`.
   * @param frameOffset where the frame begins in the segment
   * @throws CdpError FORMAT if the frame is not the next one
   */
  addFrame(table: RecordTable, firstSeq: number, frameOffset: number, maxSeq = Infinity): void {
    if (firstSeq !== this.lastSeq + 1) {
      throw new CdpError('FORMAT', 'frame is not the next one of its segment', { context: { wanted: this.lastSeq + 1, firstSeq, segment: this.segment } })
    }
    const take = Math.min(table.count, maxSeq - firstSeq + 1)
    if (this.count + take > this.keys.length) this.#grow(this.count + take)
    for (let index = 0; index < take; index++) {
      const kind = table.kind(index)
      if (!hasRange(kind)) continue
      const disk = table.disk(index)
      checkDisk(disk)
      const at = this.count++
      this.keys[at] = keyOfBytes(disk, table.offsetBytes(index))
      this.lengths[at] = table.lengthBytes(index) / SECTOR_BYTES
      this.frames[at] = frameOffset
      this.sectors[at] = hasData(kind) ? table.payloadOffset(index) / SECTOR_BYTES : NO_DATA
      this.#seqDeltas[at] = firstSeq + index - this.firstSeq
    }
    this.lastSeq = firstSeq + Math.max(take, 0) - 1
  }

  /** The newest record of every range, among those up to `seq`. Cost is that of a sort; nothing is kept here. */
  extents(seq = Infinity): ExtentList {
    return newestWins(this, this.countUpTo(seq))
  }

  /** How many records with a range have a sequence up to `seq`. */
  countUpTo(seq: number): number {
    if (seq >= this.lastSeq) return this.count
    let low = 0
    let high = this.count
    while (low < high) {
      const middle = (low + high) >>> 1
      if (this.firstSeq + this.#seqDeltas[middle] <= seq) low = middle + 1
      else high = middle
    }
    return low
  }

  #grow(wanted: number): void {
    const capacity = Math.max(wanted, this.keys.length * 2)
    const copy = <T extends Float64Array | Uint32Array | Uint16Array>(from: T, to: T): T => {
      to.set(from)
      return to
    }
    this.keys = copy(this.keys, new Float64Array(capacity))
    this.lengths = copy(this.lengths, new Uint32Array(capacity))
    this.frames = copy(this.frames, new Uint32Array(capacity))
    this.sectors = copy(this.sectors, new Uint16Array(capacity))
    this.#seqDeltas = copy(this.#seqDeltas, new Uint32Array(capacity))
  }
}
