import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { withQmp } from '../../core/qmp/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import type { DiskRange, VerifyVerdict } from '../sync/index.ts'
import { closeReadExport, drain, openReadExport } from '../qemu/index.ts'
import type { QemuDisk } from '../qemu/index.ts'
import type { AttachContext } from './attach-procedure.ts'

const QMP_DEADLINE_MS = 10_000
/** How often extents that are written all the time are looked at before they count as undecided. */
const MOST_LOOKS = 5
/** Of the differences, so many are told one by one. */
const MOST_TOLD = 1_000

/** What a verify found. `differences`: at most the first thousand extents; the bytes count all of them. */
export type VerifyReport = { comparedBytes: number; undecidedBytes: number; differingBytes: number; differences: DiskRange[] }

export type VerifyOptions = { rateBytesPerSec: number; signal: AbortSignal; onProgress: (comparedBytes: number) => void }

/**
 * Compares the disks of a streaming VM with what the recovery site holds (docs/decisions/delta-sync.md). Reads only, on both sides; the read export
 * is closed again whatever happens.
 * @throws CdpError ABORTED when the signal says so or capture was lost; what QMP and the worker throw
 */
export const verifyVm = async (context: AttachContext, disks: readonly QemuDisk[], entries: readonly DiskEntry[], options: VerifyOptions): Promise<VerifyReport> => {
  const { vm, worker, readSocketPath, existingServerPath } = context
  const { signal } = options
  const qmpOptions = { deadlineMs: QMP_DEADLINE_MS }
  signal.throwIfAborted()
  const exports = await withQmp(vm.qmpPath, qmpOptions, (qmp) => openReadExport(qmp, disks, { socketPath: readSocketPath, ...(existingServerPath === undefined ? {} : { existingServerPath }) }))
  const end = (): void => void worker.ask('endCompare', { why: errorMessage(signal.reason) }).catch(() => undefined)
  signal.addEventListener('abort', end, { once: true })
  try {
    const compared = exports.map(({ key, exportName, sizeBytes }) => {
      const entry = entries.find((one) => one.key === key)
      if (entry === undefined) throw new CdpError('INTERNAL', `${key} is exported and not captured`)
      return { disk: entry.disk, exportName, sizeBytes }
    })
    return await compareAll(compared.map(({ disk, sizeBytes }) => ({ disk, offsetBytes: 0, lengthBytes: sizeBytes })), {
      compare: (ranges) => worker.ask('compare', { exportSocketPath: exports[0].socketPath, disks: compared, ranges, rateBytesPerSec: options.rateBytesPerSec }),
      drain: () => withQmp(vm.qmpPath, qmpOptions, drain),
      judge: () => worker.ask('judge', {}),
    }, options)
  } finally {
    signal.removeEventListener('abort', end)
    await worker.ask('endCompare', { why: 'it is over' }).catch(() => undefined)
    await withQmp(vm.qmpPath, qmpOptions, (qmp) => closeReadExport(qmp, { socketPath: readSocketPath })).catch((error: unknown) => {
      context.log.warn('the read export of a verify could not be closed; it is taken away with the next attach', { vmId: vm.vmId, error: errorMessage(error) })
    })
  }
}

/** A round of a verify, done by whoever can. */
export type VerifySteps = {
  compare: (ranges: DiskRange[]) => Promise<{ comparedBytes: number; left: DiskRange[]; suspects: number }>
  drain: () => Promise<void>
  judge: () => Promise<VerifyVerdict>
}

/** Compares the ranges in rounds; what stayed undecided is looked at again, a few times. */
export const compareAll = async (whole: readonly DiskRange[], { compare, drain, judge }: VerifySteps, { signal, onProgress }: Pick<VerifyOptions, 'signal' | 'onProgress'>): Promise<VerifyReport> => {
  const report: VerifyReport = { comparedBytes: 0, undecidedBytes: 0, differingBytes: 0, differences: [] }
  let ranges = [...whole]
  for (let look = 1; look <= MOST_LOOKS && ranges.length > 0; look++) {
    const undecided: DiskRange[] = []
    while (ranges.length > 0) {
      signal.throwIfAborted()
      const round = await compare(ranges)
      report.comparedBytes += round.comparedBytes
      onProgress(report.comparedBytes)
      if (round.suspects > 0) await drain()
      const verdict = await judge()
      report.differingBytes += bytesOf(verdict.differences)
      report.differences.push(...verdict.differences.slice(0, MOST_TOLD - report.differences.length))
      undecided.push(...verdict.undecided)
      ranges = round.left
    }
    ranges = undecided
  }
  report.undecidedBytes = bytesOf(ranges)
  return report
}

const bytesOf = (ranges: readonly DiskRange[]): number => ranges.reduce((sum, { lengthBytes }) => sum + lengthBytes, 0)

/** "scsi0 at 1048576 (65536 bytes), ...": the first few, for people. */
export const describeRanges = (ranges: readonly DiskRange[], entries: readonly DiskEntry[]): string => {
  const first = ranges.slice(0, 3).map(({ disk, offsetBytes, lengthBytes }) => `${entries.find((entry) => entry.disk === disk)?.key ?? disk} at ${offsetBytes} (${lengthBytes} bytes)`)
  return `${first.join(', ')}${ranges.length > first.length ? ' and more' : ''}`
}
