import { readdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError, errorCode } from '../../core/errors/index.ts'
import type { FilePool } from './file-pool.ts'
import type { RunPlace } from './run-reader.ts'
import {
  SEGMENT_HEADER_BYTES, SEGMENT_TRAILER_BYTES, firstSeqOfSegmentFile, parseSegmentHeader, parseSegmentTrailer, segmentFileName,
} from './segment-layout.ts'

export const journalDirectory = (vmDirectory: string): string => join(vmDirectory, 'journal')
export const runsDirectory = (vmDirectory: string): string => join(vmDirectory, 'runs')

/** A merged run by its file name: it covers the segments first ... last. */
export type RunFile = { level: number; firstSegment: number; lastSegment: number; path: string; runBytes?: number }

export const runFileName = (level: number, firstSegment: number, lastSegment: number): string => `${level}-${firstSegment}-${lastSegment}.run`

/** The segments of a VM: number and first sequence, the oldest first. Known from the file names and two headers. */
export class SegmentList {
  readonly directory: string
  readonly firstNumber: number
  readonly firstSeqs: Float64Array

  constructor(directory: string, firstNumber: number, firstSeqs: Float64Array) {
    this.directory = directory
    this.firstNumber = firstNumber
    this.firstSeqs = firstSeqs
  }

  get count(): number {
    return this.firstSeqs.length
  }

  get lastNumber(): number {
    return this.firstNumber + this.count - 1
  }

  has(number: number): boolean {
    return number >= this.firstNumber && number <= this.lastNumber
  }

  firstSeq(number: number): number {
    return this.firstSeqs[number - this.firstNumber]
  }

  /** Last sequence of a segment, or undefined for the newest, which may grow. */
  lastSeq(number: number): number | undefined {
    return number < this.lastNumber ? this.firstSeq(number + 1) - 1 : undefined
  }

  path(number: number): string {
    return join(this.directory, segmentFileName(this.firstSeq(number)))
  }

  /** Number of the segment that holds (or will hold) `seq`; undefined if it lies before the first. */
  numberOf(seq: number): number | undefined {
    let low = 0
    let high = this.count
    while (low < high) {
      const middle = (low + high) >>> 1
      if (this.firstSeqs[middle] <= seq) low = middle + 1
      else high = middle
    }
    return low === 0 ? undefined : this.firstNumber + low - 1
  }
}

/** It is not what was written, or the disk does not give it any more. */
const isDamage = (error: unknown): boolean => ['CHECKSUM', 'FORMAT', 'EIO'].includes(errorCode(error) ?? '')

/** Number in the header of a segment; undefined: the file has no header yet; NaN: the header is damaged. */
const readNumber = async (files: FilePool, path: string): Promise<number | undefined> => {
  const header = Buffer.alloc(SEGMENT_HEADER_BYTES)
  try {
    if ((await files.read(path, header, 0)) < SEGMENT_HEADER_BYTES) return undefined
    return parseSegmentHeader(header).segmentNumber
  } catch (error) {
    if (isDamage(error)) return NaN
    throw error
  }
}

/** Number of the first file, from the first header that can be read, looking from one end. */
const inferFirstNumber = async (files: FilePool, paths: readonly string[], fromEnd: boolean): Promise<number> => {
  for (let step = 0; step < paths.length; step++) {
    const at = fromEnd ? paths.length - 1 - step : step
    const number = await readNumber(files, paths[at])
    if (number !== undefined && !Number.isNaN(number)) return number - at
  }
  throw new CdpError('JOURNAL_DAMAGED', 'no segment of the journal has a header that can be read', { context: { files: paths.length } })
}

/** Takes away from `paths` the oldest segments that are gone by now. @returns how many */
const dropGone = async (files: FilePool, paths: string[]): Promise<number> => {
  let gone = 0
  while (paths.length > gone) {
    try {
      await readNumber(files, paths[gone])
      break
    } catch (error) {
      if (errorCode(error) !== 'ENOENT') throw error
      gone++
    }
  }
  paths.splice(0, gone)
  return gone
}

/**
 * The segments of a VM as they are now. A newest file without a header is one that is just being made and is left out.
 * @throws CdpError JOURNAL_DAMAGED if a segment is missing in the middle
 */
export const listSegments = async (vmDirectory: string, files: FilePool): Promise<SegmentList> => {
  const directory = journalDirectory(vmDirectory)
  for (let attempt = 0; ; attempt++) {
    const names = await readdir(directory).catch((error: unknown) => {
      if (errorCode(error) === 'ENOENT') return []
      throw error
    })
    const firstSeqs = Float64Array.from(names.map(firstSeqOfSegmentFile).filter((seq) => seq !== undefined)).sort()
    const paths = Array.from(firstSeqs, (seq) => join(directory, segmentFileName(seq)))
    try {
      const newest = paths.at(-1)
      if (newest !== undefined && (await readNumber(files, newest)) === undefined) paths.pop()
      const gone = await dropGone(files, paths)
      if (paths.length === 0) return new SegmentList(directory, 0, new Float64Array(0))
      const first = await inferFirstNumber(files, paths, false)
      if ((await inferFirstNumber(files, paths, true)) === first && first >= 0) return new SegmentList(directory, first, firstSeqs.subarray(gone, gone + paths.length))
      // A list that was read while retention took segments away may show an older one and lack a newer one: only one that stays so is believed.
      if (attempt === 4) throw new CdpError('JOURNAL_DAMAGED', 'the journal lacks a segment in the middle', { context: { directory, first, files: paths.length } })
    } catch (error) {
      // A segment that retention took away while we listed: list again.
      if (errorCode(error) !== 'ENOENT' || attempt === 4) throw error
    }
  }
}

/** The merged runs of a VM, by their names. */
export const listRunFiles = async (vmDirectory: string): Promise<RunFile[]> => {
  const directory = runsDirectory(vmDirectory)
  const names = await readdir(directory).catch((error: unknown) => {
    if (errorCode(error) === 'ENOENT') return []
    throw error
  })
  const runs: RunFile[] = []
  for (const name of names) {
    const match = /^(\d{1,2})-(\d{1,15})-(\d{1,15})\.run$/.exec(name)
    if (match !== null) runs.push({ level: Number(match[1]), firstSegment: Number(match[2]), lastSegment: Number(match[3]), path: join(directory, name) })
  }
  return runs
}

/**
 * Removes merged runs that are about segments before `firstSegment` only. What is left behind by a crash is removed by the next call; no
 * run is ever needed.
 */
export const removeRunsBelow = async (vmDirectory: string, firstSegment: number): Promise<void> => {
  for (const run of await listRunFiles(vmDirectory)) if (run.lastSegment < firstSegment) await rm(run.path, { force: true })
}

/** Where the leaf run of a segment stands, or undefined if the segment is not sealed. */
export const locateLeafRun = async (files: FilePool, path: string, sizeBytes: number): Promise<(RunPlace & { lastSeq: number }) | undefined> => {
  if (sizeBytes < SEGMENT_HEADER_BYTES + SEGMENT_TRAILER_BYTES) return undefined
  const trailer = Buffer.alloc(SEGMENT_TRAILER_BYTES)
  try {
    const bytes = await files.read(path, trailer, sizeBytes - SEGMENT_TRAILER_BYTES)
    if (bytes < SEGMENT_TRAILER_BYTES) return undefined
    const { runOffsetBytes, runBytes, lastSeq } = parseSegmentTrailer(trailer)
    if (runBytes === 0 || runOffsetBytes + runBytes + SEGMENT_TRAILER_BYTES !== sizeBytes) return undefined
    return { path, offsetBytes: runOffsetBytes, runBytes, lastSeq }
  } catch (error) {
    // No trailer, or one that is damaged: the frames say the same, more slowly.
    if (isDamage(error)) return undefined
    throw error
  }
}
