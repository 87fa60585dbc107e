import { constants } from 'node:fs'
import { open } from 'node:fs/promises'
import type { FileHandle } from 'node:fs/promises'
import { crc32c } from '@node-rs/crc32'
import { writeAll } from '../../core/files/index.ts'

// mirror/<disk>.sums: pages of 4 KiB, page n for the extents from n * 1021 on (docs/format.md, Sums)
//   0  4     magic CDPM
//   4  4     reserved
//   8  4 x 1021   CRC-32C of the extent; 0: unknown (a sum of 0 is kept as 1)
//   4092 4   crc32c over bytes 0-4091. A page that does not match, or is missing, knows nothing.
const PAGE_BYTES = 4096
const MAGIC = Buffer.from('CDPM')
const SUMS_OFFSET = 8
const SUMS_A_PAGE = 1021
const CRC_OFFSET = 4092
const MAX_PAGES = 512

export const SUM_EXTENT_BYTES = 64 * 1024
export const UNKNOWN_SUM = 0
const ZERO_EXTENT = Buffer.alloc(SUM_EXTENT_BYTES)

const kept = (crc: number): number => (crc === UNKNOWN_SUM ? 1 : crc)
/** What is kept of the content of an extent. */
export const sumOf = (buffers: readonly Buffer[]): number => kept(buffers.reduce((crc, bytes) => crc32c(bytes, crc), 0))
const ZERO_SUM = sumOf([ZERO_EXTENT])
export const isZeroes = (bytes: Buffer): boolean => bytes.equals(ZERO_EXTENT.subarray(0, bytes.length))

export const sumsFileName = (disk: number): string => `${disk}.sums`

/** Checksums of the extents of one mirror disk. What is not known is learned by the scrub; nothing is durable before `datasync`. */
export class ExtentSums implements AsyncDisposable {
  readonly #handle: FileHandle
  readonly #pages = new Map<number, { bytes: Buffer; isDirty: boolean }>()
  #isWritten = false

  private constructor(handle: FileHandle) {
    this.#handle = handle
  }

  /** Opens the file, creates it if need be; the caller makes the name durable. */
  static async open(path: string): Promise<ExtentSums> {
    return new ExtentSums(await open(path, constants.O_RDWR | constants.O_CREAT, 0o640))
  }

  async get(extent: number): Promise<number> {
    return (await this.#page(extent)).bytes.readUInt32LE(placeOf(extent))
  }

  async set(extent: number, sum: number): Promise<void> {
    const page = await this.#page(extent)
    if (page.bytes.readUInt32LE(placeOf(extent)) === sum) return
    page.bytes.writeUInt32LE(sum, placeOf(extent))
    page.isDirty = true
  }

  /** A stretch of the disk was written: extents that it covers are known by its data (undefined: zeroes), those that it touches are not known any more. */
  async wrote(offsetBytes: number, lengthBytes: number, buffers: readonly Buffer[] | undefined): Promise<void> {
    const endBytes = offsetBytes + lengthBytes
    for (let extent = Math.floor(offsetBytes / SUM_EXTENT_BYTES); extent * SUM_EXTENT_BYTES < endBytes; extent++) {
      const from = extent * SUM_EXTENT_BYTES - offsetBytes
      const isCovered = from >= 0 && from + SUM_EXTENT_BYTES <= lengthBytes
      await this.set(extent, !isCovered ? UNKNOWN_SUM : buffers === undefined ? ZERO_SUM : sumOf(cutOut(buffers, from, SUM_EXTENT_BYTES)))
    }
  }

  /** Writes what changed, without making it durable. */
  async flush(): Promise<void> {
    for (const [number, page] of this.#pages) {
      if (!page.isDirty) continue
      page.bytes.writeUInt32LE(crc32c(page.bytes.subarray(0, CRC_OFFSET)), CRC_OFFSET)
      await writeAll(this.#handle, [page.bytes], PAGE_BYTES, number * PAGE_BYTES)
      page.isDirty = false
      this.#isWritten = true
    }
    this.#pages.clear()
  }

  /** Once it has failed the file is empty: pages may be read as they are not on the disk, and one that is set to the same again is not written. */
  async datasync(): Promise<void> {
    await this.flush()
    if (!this.#isWritten) return
    try {
      await this.#handle.datasync()
    } catch (error) {
      await this.#handle.truncate(0)
      throw error
    }
    this.#isWritten = false
  }

  /** What was not flushed is forgotten. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#pages.clear()
    await this.#handle.close()
  }

  async #page(extent: number): Promise<{ bytes: Buffer; isDirty: boolean }> {
    const number = Math.floor(extent / SUMS_A_PAGE)
    const known = this.#pages.get(number)
    if (known !== undefined) return known
    if (this.#pages.size >= MAX_PAGES) await this.flush()
    const bytes = Buffer.alloc(PAGE_BYTES)
    const { bytesRead } = await this.#handle.read(bytes, 0, PAGE_BYTES, number * PAGE_BYTES)
    const isWhole = bytesRead === PAGE_BYTES && bytes.subarray(0, MAGIC.length).equals(MAGIC) && crc32c(bytes.subarray(0, CRC_OFFSET)) === bytes.readUInt32LE(CRC_OFFSET)
    if (!isWhole) MAGIC.copy(bytes.fill(0))
    const page = { bytes, isDirty: false }
    this.#pages.set(number, page)
    return page
  }
}

const placeOf = (extent: number): number => SUMS_OFFSET + (extent % SUMS_A_PAGE) * 4

const cutOut = (buffers: readonly Buffer[], fromBytes: number, lengthBytes: number): Buffer[] => {
  const parts: Buffer[] = []
  let at = 0
  for (const buffer of buffers) {
    const start = Math.max(0, fromBytes - at)
    const end = Math.min(buffer.length, fromBytes + lengthBytes - at)
    if (start < end) parts.push(buffer.subarray(start, end))
    at += buffer.length
  }
  return parts
}
