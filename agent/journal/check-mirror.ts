import { join } from 'node:path'
import { errorCode } from '../../core/errors/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import type { FilePool } from '../index/index.ts'
import { ExtentSums, isZeroes, openReadableMirror, SUM_EXTENT_BYTES, sumOf, sumsFileName, UNKNOWN_SUM } from '../mirror/index.ts'
import type { ReadableMirror } from '../mirror/index.ts'

export type CheckedMirror = {
  /** Where the next check goes on; undefined: the disk ends. */
  nextBytes: number | undefined
  /** Bytes read that were not zeroes: zeroes are mostly holes, and cost no disk anything. */
  readBytes: number
  bad: { offsetBytes: number; lengthBytes: number; what: string }[]
}

const READ_BYTES = 1024 * 1024

/** The bytes, or undefined if the storage does not give them. */
const readSome = async (mirror: ReadableMirror, buffer: Buffer, offsetBytes: number): Promise<Buffer | undefined> => {
  try {
    await mirror.read(offsetBytes, buffer)
    return buffer
  } catch (error) {
    if (errorCode(error) === 'EIO' || errorCode(error) === 'NBD_REFUSED') return undefined
    throw error
  }
}

/**
 * Compares whole extents of a mirror disk with their sums, from `fromBytes` on, and learns those that are not known. The caller sees to it that nobody
 * writes to the mirror meanwhile, and that no promotion is half done.
 * @param isDamaged known to be damaged: not learned, and bad until its sum says otherwise
 */
export const checkMirror = async (vmDirectory: string, { disk, sizeBytes }: Pick<DiskEntry, 'disk' | 'sizeBytes'>, files: FilePool, fromBytes: number, maxBytes: number, isDamaged: (offsetBytes: number) => boolean): Promise<CheckedMirror> => {
  const endBytes = Math.min(fromBytes + maxBytes, Math.floor(sizeBytes / SUM_EXTENT_BYTES) * SUM_EXTENT_BYTES)
  const checked: CheckedMirror = { nextBytes: undefined, readBytes: 0, bad: [] }
  if (fromBytes >= endBytes) return checked
  const note = (offsetBytes: number, what: string): void => {
    const last = checked.bad.at(-1)
    if (last !== undefined && last.offsetBytes + last.lengthBytes === offsetBytes && last.what === what) last.lengthBytes += SUM_EXTENT_BYTES
    else checked.bad.push({ offsetBytes, lengthBytes: SUM_EXTENT_BYTES, what })
  }
  await using mirror = await openReadableMirror(vmDirectory, disk, files)
  await using sums = await ExtentSums.open(join(vmDirectory, 'mirror', sumsFileName(disk)))
  const buffer = Buffer.allocUnsafe(Math.min(READ_BYTES, endBytes - fromBytes))
  for (let at = fromBytes; at < endBytes; at += buffer.length) {
    const lengthBytes = Math.min(buffer.length, endBytes - at)
    const whole = await readSome(mirror, buffer.subarray(0, lengthBytes), at)
    for (let offsetBytes = at; offsetBytes < at + lengthBytes; offsetBytes += SUM_EXTENT_BYTES) {
      const bytes = whole?.subarray(offsetBytes - at, offsetBytes - at + SUM_EXTENT_BYTES) ?? (await readSome(mirror, Buffer.allocUnsafe(SUM_EXTENT_BYTES), offsetBytes))
      if (bytes === undefined) {
        note(offsetBytes, 'it cannot be read')
        continue
      }
      const extent = offsetBytes / SUM_EXTENT_BYTES
      const expected = await sums.get(extent)
      const isEmpty = isZeroes(bytes)
      if (!isEmpty) checked.readBytes += bytes.length
      if (expected !== UNKNOWN_SUM) {
        if (sumOf([bytes]) !== expected) note(offsetBytes, 'it does not match its checksum')
      } else if (isDamaged(offsetBytes)) note(offsetBytes, 'it was damaged, and was written again in part only')
      else if (!isEmpty) await sums.set(extent, sumOf([bytes]))
    }
  }
  await sums.flush()
  return { ...checked, nextBytes: endBytes }
}
