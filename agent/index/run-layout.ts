import { crc32c } from '@node-rs/crc32'
import { readU64, writeU64 } from '../../core/record/index.ts'
import { CdpError } from '../../core/errors/index.ts'

// Pages of a run, version 1 (docs/format.md, Run).

export const PAGE_BYTES = 4096
export const PAGE_CRC_OFFSET = 4092
export const PAGE_ENTRIES_OFFSET = 32
export const LEAF_MAGIC = 0x4c504443
export const INNER_MAGIC = 0x4e504443
export const HEADER_MAGIC = 0x52504443
export const RUN_VERSION = 1
export const LEAF_ENTRY_BYTES = 14
export const INNER_ENTRY_BYTES = 12
export const LEAF_CAPACITY = Math.floor((PAGE_CRC_OFFSET - PAGE_ENTRIES_OFFSET) / LEAF_ENTRY_BYTES)
export const INNER_CAPACITY = Math.floor((PAGE_CRC_OFFSET - PAGE_ENTRIES_OFFSET) / INNER_ENTRY_BYTES)
export const MAX_ENTRY_SECTORS = 0xffff
export const MAX_SEGMENT_DELTA = 0xffff
export const MAX_START_DELTA = 0xffff_ffff
export const MAX_HEIGHT = 8

export type RunHeader = {
  /** Levels of pages from root to leaf; 0: the run is empty. */
  height: number
  entryCount: number
  firstSegment: number
  lastSegment: number
  rootPage: number
  /** With the header page, which is the last one. */
  pageCount: number
  /** Sequence of the last record the run knows of. */
  lastSeq: number
}

const damaged = (message: string, context: Record<string, number>): CdpError => new CdpError('CHECKSUM', message, { context })

export const sealPage = (page: Buffer): void => {
  page.writeUInt32LE(crc32c(page.subarray(0, PAGE_CRC_OFFSET)), PAGE_CRC_OFFSET)
}

/**
 * Checks a page of a run: checksum, magic, count of entries.
 * @throws CdpError CHECKSUM if the page is not what was written
 */
export const verifyPage = (page: Buffer, pageNumber: number): void => {
  if (page.length !== PAGE_BYTES) throw damaged('page of an index run is cut short', { pageNumber, bytes: page.length })
  if (page.readUInt32LE(PAGE_CRC_OFFSET) !== crc32c(page.subarray(0, PAGE_CRC_OFFSET))) throw damaged('page of an index run does not match its checksum', { pageNumber })
  const magic = page.readUInt32LE(0)
  const capacity = magic === LEAF_MAGIC ? LEAF_CAPACITY : magic === INNER_MAGIC ? INNER_CAPACITY : magic === HEADER_MAGIC ? MAX_HEIGHT : -1
  const count = magic === HEADER_MAGIC ? page.readUInt16LE(6) : page.readUInt16LE(4)
  if (count > capacity || (magic !== HEADER_MAGIC && count === 0)) throw damaged('page of an index run makes no sense', { pageNumber, magic, count })
}

export const encodeRunHeader = (header: RunHeader): Buffer => {
  const page = Buffer.alloc(PAGE_BYTES)
  page.writeUInt32LE(HEADER_MAGIC, 0)
  page.writeUInt16LE(RUN_VERSION, 4)
  page.writeUInt16LE(header.height, 6)
  writeU64(page, header.entryCount, 8)
  writeU64(page, header.firstSegment, 16)
  writeU64(page, header.lastSegment, 24)
  writeU64(page, header.rootPage, 32)
  writeU64(page, header.pageCount, 40)
  writeU64(page, header.lastSeq, 48)
  sealPage(page)
  return page
}

/** @throws CdpError CHECKSUM or FORMAT */
export const parseRunHeader = (page: Buffer): RunHeader => {
  verifyPage(page, -1)
  if (page.readUInt32LE(0) !== HEADER_MAGIC) throw new CdpError('FORMAT', 'index run without a header page')
  const version = page.readUInt16LE(4)
  if (version !== RUN_VERSION) throw new CdpError('FORMAT', `index run of unknown version ${version}`)
  const header = {
    height: page.readUInt16LE(6),
    entryCount: readU64(page, 8),
    firstSegment: readU64(page, 16),
    lastSegment: readU64(page, 24),
    rootPage: readU64(page, 32),
    pageCount: readU64(page, 40),
    lastSeq: readU64(page, 48),
  }
  const fits = header.lastSegment >= header.firstSegment && header.pageCount > 0 && header.rootPage < header.pageCount && header.height <= MAX_HEIGHT
  if (!fits || header.pageCount > 0xffff_ffff) throw new CdpError('FORMAT', 'index run whose header contradicts itself')
  return header
}
