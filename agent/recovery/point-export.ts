import { BASE_ALLOCATION, NBD_STATE_HOLE, NBD_STATE_ZERO } from '../../core/nbd/index.ts'
import type { Extent, NbdExport } from '../../core/nbd/index.ts'
import type { RecoveryPoint } from './recovery-point.ts'

const MAX_READ_BYTES = 32 * 1024 * 1024

/** One disk of a recovery point as a read-only NBD export. */
export class PointExport implements NbdExport {
  readonly name: string
  readonly sizeBytes: number
  readonly readOnly = true
  readonly description: string
  readonly blockSize = { minBytes: 1, preferredBytes: 4096, maxBytes: MAX_READ_BYTES }
  readonly canMultiConn = true
  readonly metaContexts = [BASE_ALLOCATION]
  /** Clients in transmission. */
  clientCount = 0
  readonly #point: RecoveryPoint
  readonly #disk: number

  constructor(name: string, point: RecoveryPoint, disk: { disk: number; key: string; sizeBytes: number }) {
    this.name = name
    this.sizeBytes = disk.sizeBytes
    this.description = `${disk.key} of ${point.vm} at ${point.seq}`
    this.#point = point
    this.#disk = disk.disk
  }

  read(offsetBytes: number, lengthBytes: number): Promise<readonly Uint8Array[]> {
    return this.#point.read(this.#disk, offsetBytes, lengthBytes)
  }

  async blockStatus(_context: string, offsetBytes: number, lengthBytes: number): Promise<readonly Extent[]> {
    const extents = await this.#point.blockStatus(this.#disk, offsetBytes, lengthBytes)
    return extents.map((extent) => ({ lengthBytes: extent.lengthBytes, flags: extent.isHole ? NBD_STATE_HOLE | NBD_STATE_ZERO : 0 }))
  }

  opened(): void {
    this.clientCount++
  }

  closed(): void {
    this.clientCount--
  }
}
