import { asList, asObject, countField, objectField, optionalField, stringField } from '../../core/qmp/index.ts'
import type { Qmp } from '../../core/qmp/index.ts'
import { readChains, readJobs } from './block-state.ts'
import type { BlockJob } from './block-state.ts'
import { keyOfQdev } from './disks.ts'
import { namesOf } from './names.ts'

/** What the guest did to a disk since QEMU started, and whether it still passes us. Failed operations are counted, their bytes are not. */
export type DiskCounters = {
  key: string
  wrBytes: number
  wrOperations: number
  unmapBytes: number
  unmapOperations: number
  failedWrOperations: number
  failedUnmapOperations: number
  job: Omit<BlockJob, 'id' | 'type'> | undefined
  /** The guest's writes come by our job's filter, whatever others have put above it, and the job runs. False after a disk move: an orphaned job. */
  onPath: boolean
}

/** Pure: answers of query-blockstats and query-block-jobs to counters by disk key. */
export const readDiskCounters = (stats: unknown, jobs: readonly BlockJob[]): Map<string, DiskCounters> => {
  const counters = new Map<string, DiskCounters>()
  const chains = readChains(stats)
  for (const value of asList(stats, 'query-blockstats')) {
    const entry = asObject(value, 'block statistics')
    const qdev = optionalField(entry, 'qdev', stringField) ?? ''
    const key = keyOfQdev(qdev)
    if (key === undefined) continue
    const numbers = objectField(entry, 'stats')
    const names = namesOf(key)
    const found = jobs.find((job) => job.id === names.job)
    counters.set(key, {
      key,
      wrBytes: countField(numbers, 'wr_bytes'), wrOperations: countField(numbers, 'wr_operations'),
      unmapBytes: countField(numbers, 'unmap_bytes'), unmapOperations: countField(numbers, 'unmap_operations'),
      failedWrOperations: countField(numbers, 'failed_wr_operations'), failedUnmapOperations: countField(numbers, 'failed_unmap_operations'),
      job: found && { status: found.status, ready: found.ready, paused: found.paused, failed: found.failed },
      onPath: found !== undefined && !found.failed && (chains.get(qdev) ?? []).includes(names.filter),
    })
  }
  return counters
}

/** Two queries over one connection, for the slow poll and for proving checkpoints. */
export const readCounters = async (qmp: Pick<Qmp, 'execute'>): Promise<Map<string, DiskCounters>> => {
  const [stats, jobs] = await Promise.all([qmp.execute('query-blockstats'), qmp.execute('query-block-jobs')])
  return readDiskCounters(stats, readJobs(jobs))
}
