import { HASH_EXTENT_BYTES } from '../../core/stream/index.ts'

/**
 * Which extents of the disks live operations have touched since this was made: one bit for 64 KiB, 2 MiB for a disk of 1 TiB. What a
 * comparison finds different there is no proof of anything.
 */
export class RecordedSince {
  readonly #bits = new Map<number, Uint8Array>()

  constructor(disks: readonly { disk: number; sizeBytes: number }[]) {
    for (const { disk, sizeBytes } of disks) this.#bits.set(disk, new Uint8Array(Math.ceil(sizeBytes / HASH_EXTENT_BYTES / 8)))
  }

  mark(disk: number, offsetBytes: number, lengthBytes: number): void {
    const bits = this.#bits.get(disk)
    if (bits === undefined) return
    const last = Math.floor((offsetBytes + lengthBytes - 1) / HASH_EXTENT_BYTES)
    for (let extent = Math.floor(offsetBytes / HASH_EXTENT_BYTES); extent <= last; extent++) bits[extent >>> 3] |= 1 << (extent & 7)
  }

  /** True if the extent that holds `offsetBytes` was touched. */
  has(disk: number, offsetBytes: number): boolean {
    const extent = Math.floor(offsetBytes / HASH_EXTENT_BYTES)
    const bits = this.#bits.get(disk)
    return bits !== undefined && (bits[extent >>> 3] & (1 << (extent & 7))) !== 0
  }
}
