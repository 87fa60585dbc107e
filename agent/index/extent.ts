import { SECTOR_BYTES } from '../../core/record/index.ts'
import { CdpError } from '../../core/errors/index.ts'

/** `sector` of an extent that holds zeroes and no data. */
export const NO_DATA = 0xffff
/** Disks of one VM; keys stay exact numbers below 2^53 with it. */
export const MAX_DISKS = 4096
const SECTORS_PER_DISK = 2 ** 40

/** Where a sector stands in the order of an index: disk * 2^40 + sector. */
export const keyOf = (disk: number, sector: number): number => disk * SECTORS_PER_DISK + sector

export const keyOfBytes = (disk: number, offsetBytes: number): number => disk * SECTORS_PER_DISK + offsetBytes / SECTOR_BYTES

export const diskOfKey = (key: number): number => Math.floor(key / SECTORS_PER_DISK)

/** Byte offset on its disk of a key. */
export const offsetOfKey = (key: number): number => (key % SECTORS_PER_DISK) * SECTOR_BYTES

export const checkDisk = (disk: number): void => {
  if (disk >= MAX_DISKS) throw new CdpError('FORMAT', 'record names a disk number out of range', { context: { disk } })
}

/** Extents in memory, one after the other in five typed arrays: sorted by key and not overlapping. */
export class ExtentList {
  keys: Float64Array
  lengths: Uint32Array
  frames: Uint32Array
  sectors: Uint16Array
  count = 0
  /** All extents of a list are of one segment. */
  readonly segment: number

  constructor(segment: number, capacity: number) {
    this.segment = segment
    this.keys = new Float64Array(capacity)
    this.lengths = new Uint32Array(capacity)
    this.frames = new Uint32Array(capacity)
    this.sectors = new Uint16Array(capacity)
  }

  get memoryBytes(): number {
    return this.keys.length * 18
  }

  /** Appends an extent; joins it to the last one if both are neighbours on the disk and in the payload, too. */
  push(key: number, length: number, frame: number, sector: number): void {
    const last = this.count - 1
    if (last >= 0 && this.keys[last] + this.lengths[last] === key && this.lengths[last] + length <= 0xffff_ffff && this.#continues(last, frame, sector)) {
      this.lengths[last] += length
      return
    }
    if (this.count === this.keys.length) this.#grow()
    this.keys[this.count] = key
    this.lengths[this.count] = length
    this.frames[this.count] = sector === NO_DATA ? 0 : frame
    this.sectors[this.count] = sector
    this.count++
  }

  /** Gives back memory that is not used. */
  trim(): this {
    if (this.keys.length > this.count * 1.25) this.#resize(this.count)
    return this
  }

  #continues(last: number, frame: number, sector: number): boolean {
    if (sector === NO_DATA) return this.sectors[last] === NO_DATA
    return this.sectors[last] !== NO_DATA && this.frames[last] === frame && this.sectors[last] + this.lengths[last] === sector
  }

  #grow(): void {
    this.#resize(Math.max(64, this.count * 2))
  }

  #resize(capacity: number): void {
    const copy = <T extends Float64Array | Uint32Array | Uint16Array>(from: T, to: T): T => {
      to.set(from.subarray(0, this.count))
      return to
    }
    this.keys = copy(this.keys, new Float64Array(capacity))
    this.lengths = copy(this.lengths, new Uint32Array(capacity))
    this.frames = copy(this.frames, new Uint32Array(capacity))
    this.sectors = copy(this.sectors, new Uint16Array(capacity))
  }
}
