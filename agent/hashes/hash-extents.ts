import { hash } from 'node:crypto'
import { CdpError, errorCode } from '../../core/errors/index.ts'
import { HashMark } from '../../core/stream/index.ts'
import type { ExtentHashes } from '../../core/stream/index.ts'
import type { ExtentReader } from './extent-reader.ts'

const READ_BYTES = 1024 * 1024
const ZEROES = Buffer.alloc(READ_BYTES)

export type ExtentRange = { disk: number; offsetBytes: number; extentBytes: number; extentCount: number }

/**
 * Marks and hashes of a range of extents. Holes are not read; an extent that cannot be read because of damage is marked unknown.
 * @throws CdpError BAD_INPUT outside the disk; what reading throws otherwise
 */
export const hashExtents = async (reader: ExtentReader, { disk, offsetBytes, extentBytes, extentCount }: ExtentRange): Promise<ExtentHashes> => {
  const sizeBytes = reader.disks.find((one) => one.disk === disk)?.sizeBytes
  if (sizeBytes === undefined || offsetBytes + (extentCount - 1) * extentBytes >= sizeBytes) throw new CdpError('BAD_INPUT', 'extents outside the disk', { context: { disk, offsetBytes, extentCount } })
  const endBytes = Math.min(sizeBytes, offsetBytes + extentCount * extentBytes)
  const marks = new Uint8Array(extentCount).fill(HashMark.zero)
  const hashes: Buffer[] = []
  const bytesOf = (extent: number): number => Math.min(extentBytes, endBytes - offsetBytes - extent * extentBytes)
  const mayHoldData = await dataExtents(reader, disk, offsetBytes, endBytes, extentBytes, extentCount)

  const look = (extent: number, bytes: Buffer): void => {
    if (bytes.equals(ZEROES.subarray(0, bytes.length))) return
    marks[extent] = HashMark.hash
    hashes.push(hash('sha256', bytes, 'buffer'))
  }
  const perRead = READ_BYTES / extentBytes
  for (let first = 0; first < extentCount; ) {
    if (!mayHoldData[first]) {
      first++
      continue
    }
    let end = first + 1
    while (end < extentCount && end - first < perRead && mayHoldData[end]) end++
    const lengthBytes = (end - 1 - first) * extentBytes + bytesOf(end - 1)
    const bytes = await readSome(reader, disk, offsetBytes + first * extentBytes, lengthBytes)
    for (let extent = first; extent < end; extent++) {
      const at = (extent - first) * extentBytes
      const one = bytes?.subarray(at, at + bytesOf(extent)) ?? (await readSome(reader, disk, offsetBytes + extent * extentBytes, bytesOf(extent)))
      if (one === undefined) marks[extent] = HashMark.unknown
      else look(extent, one)
    }
    first = end
  }
  return { marks, hashes: Buffer.concat(hashes) }
}

/** The bytes, or undefined if a part of the journal that they need is damaged, or the disk below does not give them. */
const readSome = async (reader: ExtentReader, disk: number, offsetBytes: number, lengthBytes: number): Promise<Buffer | undefined> => {
  try {
    const parts = await reader.read(disk, offsetBytes, lengthBytes)
    const [only] = parts
    return parts.length === 1 ? Buffer.from(only.buffer, only.byteOffset, only.byteLength) : Buffer.concat(parts)
  } catch (error) {
    const isUnreadable = errorCode(error) === 'JOURNAL_DAMAGED' || errorCode(error) === 'EIO' || (error instanceof CdpError && error.context.errno === 'EIO')
    if (isUnreadable) return undefined
    throw error
  }
}

const dataExtents = async (reader: ExtentReader, disk: number, offsetBytes: number, endBytes: number, extentBytes: number, extentCount: number): Promise<Uint8Array> => {
  const mayHoldData = new Uint8Array(extentCount)
  let at = offsetBytes
  while (at < endBytes) {
    for (const { lengthBytes, isHole } of await reader.blockStatus(disk, at, endBytes - at)) {
      if (!isHole) mayHoldData.fill(1, Math.floor((at - offsetBytes) / extentBytes), Math.ceil((at + lengthBytes - offsetBytes) / extentBytes))
      at += lengthBytes
    }
  }
  return mayHoldData
}
