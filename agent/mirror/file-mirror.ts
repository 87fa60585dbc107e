import { constants } from 'node:fs'
import { open } from 'node:fs/promises'
import type { FileHandle } from 'node:fs/promises'
import { CdpError } from '../../core/errors/index.ts'
import { writeAll } from '../../core/files/index.ts'
import { isDoubted, noteDoubt } from './doubt-mark.ts'
import type { MirrorDisk } from './mirror-disk.ts'

const GRANULE_BYTES = 1024 * 1024
const ZEROES = Buffer.alloc(GRANULE_BYTES)

/**
 * A mirror disk of kind `file`: a sparse raw file of the disk's size. Reads behind its end and in its holes are zeroes.
 *
 * Zeroing: Node has no way to punch a hole. A range that reads as zeroes already (a hole is read at memory speed) is left
 * alone, so a hole stays one; anything else is overwritten with zeroes, which keeps its blocks allocated. A file that had no
 * blocks when it was opened is known by granules of 1 MiB, so that what was never written is not even read. Once an fdatasync
 * has failed, what reads as zeroes may be on no disk: until the next boot of the machine all zeroes are written.
 */
export class FileMirror implements MirrorDisk {
  readonly path: string
  readonly lanes = 1
  readonly #handle: FileHandle
  #sizeBytes: number
  /** One bit a granule: may hold data. Undefined: everything may. */
  readonly #touched: Uint8Array | undefined
  #isDoubted: boolean
  #dirty = false
  #closed = false

  private constructor(path: string, handle: FileHandle, sizeBytes: number, touched: Uint8Array | undefined, doubted: boolean) {
    this.path = path
    this.#handle = handle
    this.#sizeBytes = sizeBytes
    this.#touched = touched
    this.#isDoubted = doubted
  }

  /**
   * Opens the file, creates it if need be, and lets it grow to `sizeBytes`. It never shrinks.
   * The caller makes the name durable (fsync of the directory).
   */
  static async open(path: string, sizeBytes: number): Promise<FileMirror> {
    const handle = await open(path, constants.O_RDWR | constants.O_CREAT, 0o640)
    try {
      const stat = await handle.stat()
      if (stat.size < sizeBytes) await handle.truncate(sizeBytes)
      const touched = stat.blocks === 0 ? new Uint8Array(Math.ceil(sizeBytes / GRANULE_BYTES / 8)) : undefined
      return new FileMirror(path, handle, Math.max(stat.size, sizeBytes), touched, await isDoubted(path))
    } catch (error) {
      await handle.close()
      throw error
    }
  }

  get sizeBytes(): number {
    return this.#sizeBytes
  }

  get dirty(): boolean {
    return this.#dirty
  }

  async write(offsetBytes: number, buffers: Buffer[], lengthBytes: number): Promise<void> {
    this.#check(offsetBytes, lengthBytes)
    this.#touch(offsetBytes, lengthBytes)
    this.#dirty = true
    await writeAll(this.#handle, buffers, lengthBytes, offsetBytes)
  }

  async zero(offsetBytes: number, lengthBytes: number): Promise<void> {
    this.#check(offsetBytes, lengthBytes)
    const scratch = Buffer.allocUnsafe(Math.min(GRANULE_BYTES, lengthBytes))
    const endBytes = offsetBytes + lengthBytes
    let at = offsetBytes
    while (at < endBytes) {
      const next = Math.min(endBytes, (Math.floor(at / GRANULE_BYTES) + 1) * GRANULE_BYTES)
      if (this.#isDoubted) await this.write(at, [ZEROES.subarray(0, next - at)], next - at)
      else if (this.#mayHoldData(at)) await this.#zeroPiece(at, next - at, scratch)
      at = next
    }
  }

  /** Reads `target.length` bytes at `offsetBytes`; zeroes behind the end of the file. */
  async read(offsetBytes: number, target: Buffer): Promise<void> {
    let done = 0
    while (done < target.length) {
      const { bytesRead } = await this.#handle.read(target, done, target.length - done, offsetBytes + done)
      if (bytesRead === 0) {
        target.fill(0, done)
        return
      }
      done += bytesRead
    }
  }

  /** Behind the map of granules everything counts as written. */
  async grow(sizeBytes: number): Promise<void> {
    if (sizeBytes <= this.#sizeBytes) return
    await this.#handle.truncate(sizeBytes)
    this.#sizeBytes = sizeBytes
    this.#dirty = true
  }

  /** A failed one must not be repeated on this file: close, open, apply again. */
  async datasync(): Promise<void> {
    if (!this.#dirty) return
    try {
      await this.#handle.datasync()
    } catch (error) {
      this.#isDoubted = true
      await noteDoubt(this.path)
      throw error
    }
    this.#dirty = false
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    await this.#handle.close()
  }

  async #zeroPiece(offsetBytes: number, lengthBytes: number, scratch: Buffer): Promise<void> {
    const piece = scratch.subarray(0, lengthBytes)
    await this.read(offsetBytes, piece)
    const zeroes = ZEROES.subarray(0, lengthBytes)
    // An agent that was killed may have written them, and nobody has made them durable.
    this.#dirty = true
    if (piece.equals(zeroes)) return
    await this.write(offsetBytes, [zeroes], lengthBytes)
  }

  #check(offsetBytes: number, lengthBytes: number): void {
    if (offsetBytes < 0 || lengthBytes < 0 || offsetBytes + lengthBytes > this.#sizeBytes) {
      throw new CdpError('BAD_INPUT', 'access outside a mirror disk', { context: { offsetBytes, lengthBytes, sizeBytes: this.#sizeBytes } })
    }
  }

  #touch(offsetBytes: number, lengthBytes: number): void {
    const touched = this.#touched
    if (touched === undefined || lengthBytes === 0) return
    const last = Math.floor((offsetBytes + lengthBytes - 1) / GRANULE_BYTES)
    for (let granule = Math.floor(offsetBytes / GRANULE_BYTES); granule <= last; granule++) touched[granule >>> 3] |= 1 << (granule & 7)
  }

  #mayHoldData(offsetBytes: number): boolean {
    const touched = this.#touched
    if (touched === undefined) return true
    const granule = Math.floor(offsetBytes / GRANULE_BYTES)
    return granule >>> 3 >= touched.length || (touched[granule >>> 3] & (1 << (granule & 7))) !== 0
  }
}
