import { closeSync, fsyncSync, mkdirSync, openSync, readSync, readdirSync, renameSync, statSync, unlinkSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { CdpError, errorCode, errorMessage } from '../../core/errors/index.ts'
import { FilePool } from './file-pool.ts'
import { ListInput, RunInput } from './merge-input.ts'
import type { MergeInput } from './merge-input.ts'
import { mergeRuns } from './merge-runs.ts'
import { PAGE_BYTES, parseRunHeader } from './run-layout.ts'
import type { RunPlace } from './run-reader.ts'
import { RunWriter } from './run-writer.ts'
import { scanRecords } from './segment-scan.ts'
import { listRunFiles, listSegments, locateLeafRun, runFileName, runsDirectory } from './vm-files.ts'
import type { SegmentList } from './vm-files.ts'

/** Runs of one level that are merged into one of the next. */
export const RUN_FANOUT = 32
const WRITE_BYTES = 256 * 1024

export type MergeReport = {
  written: { level: number; firstSegment: number; lastSegment: number; entryCount: number; runBytes: number; elapsedMs: number }[]
  /** Runs that were damaged and were made again, or made up for from frames. */
  damaged: { path: string; reason: string }[]
}

type Job = { level: number; first: number; last: number }

/**
 * Makes every merged run of a VM that is due: all 32 runs below exist and their segments are sealed. Runs in a worker
 * thread (its reads are synchronous). A half-written run of a former attempt is discarded; doing it twice is harmless.
 */
export const mergeVm = async (vmDirectory: string, fanout = RUN_FANOUT): Promise<MergeReport> => {
  const report: MergeReport = { written: [], damaged: [] }
  const runs = runsDirectory(vmDirectory)
  mkdirSync(runs, { recursive: true })
  for (const name of readdirSync(runs)) if (name.endsWith('.tmp')) unlinkSync(join(runs, name))
  await using files = new FilePool(8)
  const segments = await listSegments(vmDirectory, files)
  if (segments.count === 0) return report
  for (let level = 1; fanout ** level <= segments.count + fanout; level++) {
    const span = fanout ** level
    const present = new Set((await listRunFiles(vmDirectory)).filter((run) => run.level === level).map((run) => run.firstSegment))
    for (let first = Math.ceil(segments.firstNumber / span) * span; first + span - 1 < segments.lastNumber; first += span) {
      if (present.has(first)) continue
      const written = await mergeOne(vmDirectory, segments, files, { level, first, last: first + span - 1 }, fanout, report)
      if (!written) break
    }
  }
  return report
}

const mergeOne = async (vmDirectory: string, segments: SegmentList, files: FilePool, job: Job, fanout: number, report: MergeReport): Promise<boolean> => {
  const started = performance.now()
  const fds: number[] = []
  try {
    const inputs = await openInputs(vmDirectory, segments, files, job, fanout, fds, report)
    if (inputs === undefined) return false
    const lastSeq = segments.lastSeq(job.last) ?? 0
    const path = join(runsDirectory(vmDirectory), runFileName(job.level, job.first, job.last))
    const result = writeRun(path, inputs, { firstSegment: job.first, lastSegment: job.last, lastSeq })
    report.written.push({ level: job.level, firstSegment: job.first, lastSegment: job.last, elapsedMs: performance.now() - started, ...result })
    return true
  } catch (error) {
    // An input that retention took away meanwhile: nobody needs this run any more.
    if (errorCode(error) === 'ENOENT') return false
    throw error
  } finally {
    for (const fd of fds) closeSync(fd)
  }
}

/** The inputs of a job, newest first; undefined if one is not there yet. */
const openInputs = async (
  vmDirectory: string, segments: SegmentList, files: FilePool, job: Job, fanout: number, fds: number[], report: MergeReport,
): Promise<MergeInput[] | undefined> => {
  const inputs: MergeInput[] = []
  const span = fanout ** (job.level - 1)
  for (let last = job.last; last >= job.first; last -= span) {
    if (job.level === 1) {
      const path = segments.path(last)
      const place = await locateLeafRun(files, path, statSync(path).size)
      if (place === undefined) return undefined
      try {
        inputs.push(openInput(place, fds))
      } catch (error) {
        if (!isDamage(error)) throw error
        report.damaged.push({ path, reason: errorMessage(error) })
        const untilSeq = segments.lastSeq(last) ?? 0
        inputs.push(new ListInput((await scanRecords(files, { path, segment: last, firstSeq: segments.firstSeq(last), untilSeq })).extents()))
      }
    } else {
      const path = join(runsDirectory(vmDirectory), runFileName(job.level - 1, last - span + 1, last))
      try {
        inputs.push(openInput({ path, offsetBytes: 0, runBytes: statSync(path).size }, fds))
      } catch (error) {
        if (errorCode(error) === 'ENOENT') return undefined
        if (!isDamage(error)) throw error
        // A merged run can be made again at any time: this pass ends here, the next one finds it missing.
        report.damaged.push({ path, reason: errorMessage(error) })
        unlinkSync(path)
        return undefined
      }
    }
  }
  return inputs
}

const isDamage = (error: unknown): boolean => errorCode(error) === 'CHECKSUM' || errorCode(error) === 'FORMAT'

/** Opens a run and checks all of it, so that damage is known before anything is written. */
const openInput = (place: RunPlace, fds: number[]): RunInput => {
  const fd = openSync(place.path, 'r')
  fds.push(fd)
  const page = Buffer.alloc(PAGE_BYTES)
  const bytes = readSync(fd, page, 0, PAGE_BYTES, place.offsetBytes + place.runBytes - PAGE_BYTES)
  const header = parseRunHeader(page.subarray(0, bytes))
  if (header.pageCount * PAGE_BYTES !== place.runBytes) throw new CdpError('FORMAT', 'index run of another size than its header says', { context: { path: place.path } })
  const probe = new RunInput(fd, place.path, place.offsetBytes, header.pageCount - 1)
  while (probe.key !== Infinity) probe.advance()
  return new RunInput(fd, place.path, place.offsetBytes, header.pageCount - 1)
}

/** Writes a run beside its place, makes it durable and puts it there. */
const writeRun = (
  path: string, inputs: MergeInput[], covers: { firstSegment: number; lastSegment: number; lastSeq: number },
): { entryCount: number; runBytes: number } => {
  const temporary = `${path}.tmp`
  const fd = openSync(temporary, 'w')
  const buffer = Buffer.allocUnsafeSlow(WRITE_BYTES)
  let used = 0
  const flush = (): void => {
    for (let done = 0; done < used;) done += writeSync(fd, buffer, done, used - done)
    used = 0
  }
  let result: { entryCount: number; runBytes: number }
  try {
    const writer = new RunWriter((page) => {
      if (used + page.length > buffer.length) flush()
      used += page.copy(buffer, used)
    })
    mergeRuns(inputs, writer)
    result = writer.finish(covers)
    flush()
    fsyncSync(fd)
  } finally {
    closeSync(fd)
  }
  renameSync(temporary, path)
  syncDirectory(join(path, '..'))
  return result
}

const syncDirectory = (directory: string): void => {
  const fd = openSync(directory, 'r')
  try {
    fsyncSync(fd)
  } finally {
    closeSync(fd)
  }
}
