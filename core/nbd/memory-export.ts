import * as nbd from './constants.ts'
import type { Extent, NbdExport } from './export.ts'

export type MemoryExportOptions = { name: string; sizeBytes: number; readOnly?: boolean; description?: string; sparseReads?: boolean; minBytes?: number }

const BLOCK_BYTES = 4096
const ZEROS = Buffer.alloc(BLOCK_BYTES)

/** An export that keeps its bytes in memory and knows which 4 KiB blocks hold nothing but zeros: what tests and benches serve. */
export class MemoryExport implements NbdExport {
  readonly name: string
  readonly sizeBytes: number
  readonly readOnly: boolean
  readonly canMultiConn = true
  readonly metaContexts = [nbd.BASE_ALLOCATION]
  readonly fastZero = true
  readonly sparseReads: boolean
  readonly description?: string
  readonly blockSize: { minBytes: number; preferredBytes: number; maxBytes: number }
  /** The disk itself; tests look at it and fill it. */
  readonly bytes: Buffer
  openCount = 0
  flushCount = 0

  constructor(options: MemoryExportOptions) {
    this.name = options.name
    this.sizeBytes = options.sizeBytes
    this.readOnly = options.readOnly ?? false
    this.sparseReads = options.sparseReads ?? false
    if (options.description !== undefined) this.description = options.description
    this.blockSize = { minBytes: options.minBytes ?? 1, preferredBytes: BLOCK_BYTES, maxBytes: nbd.DEFAULT_MAX_PAYLOAD_BYTES }
    this.bytes = Buffer.alloc(options.sizeBytes)
  }

  opened(): void {
    this.openCount += 1
  }

  closed(): void {
    this.openCount -= 1
  }

  /** A copy: the reply leaves later, and a write may come in between. */
  async read(offsetBytes: number, lengthBytes: number): Promise<readonly Uint8Array[]> {
    return [Buffer.from(this.bytes.subarray(offsetBytes, offsetBytes + lengthBytes))]
  }

  async write(offsetBytes: number, data: Buffer): Promise<void> {
    data.copy(this.bytes, offsetBytes)
  }

  async writeZeroes(offsetBytes: number, lengthBytes: number): Promise<void> {
    this.bytes.fill(0, offsetBytes, offsetBytes + lengthBytes)
  }

  async trim(offsetBytes: number, lengthBytes: number): Promise<void> {
    this.bytes.fill(0, offsetBytes, offsetBytes + lengthBytes)
  }

  async flush(): Promise<void> {
    this.flushCount += 1
  }

  async blockStatus(_context: string, offsetBytes: number, lengthBytes: number): Promise<readonly Extent[]> {
    const extents: Extent[] = []
    const endBytes = offsetBytes + lengthBytes
    for (let atBytes = offsetBytes; atBytes < endBytes; ) {
      const stopBytes = Math.min(atBytes - (atBytes % BLOCK_BYTES) + BLOCK_BYTES, endBytes)
      const zero = this.bytes.subarray(atBytes, stopBytes).equals(ZEROS.subarray(0, stopBytes - atBytes))
      const flags = zero ? nbd.NBD_STATE_HOLE | nbd.NBD_STATE_ZERO : 0
      const last = extents.at(-1)
      if (last && last.flags === flags) last.lengthBytes += stopBytes - atBytes
      else extents.push({ lengthBytes: stopBytes - atBytes, flags })
      atBytes = stopBytes
    }
    return extents
  }
}
