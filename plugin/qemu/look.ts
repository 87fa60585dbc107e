import type { Qmp } from '../../core/qmp/index.ts'
import { queryBlockState, readNodes } from './block-state.ts'
import { readDiskCounters } from './counters.ts'
import type { DiskCounters } from './counters.ts'
import { describeDisks } from './disks.ts'
import { bitmapNumber } from './names.ts'

/** What the slow poll sees of a VM. */
export type VmLook = {
  counters: ReadonlyMap<string, DiskCounters>
  /** Sizes in bytes of the disks that can be protected, by key. */
  sizes: ReadonlyMap<string, number>
  /** Every write that was under way when the question was asked had ended when the counters were read. */
  drained: boolean
}

/**
 * Makes QEMU wait until no write is under way: whatever it had begun has reached the disk, our bitmaps and us. It waits for slow storage.
 * A transaction drains all before its first action; there was a proposal to drain the nodes of its actions only, so there is one for each
 * disk, which changes nothing: what records is told to record.
 */
export const drain = async (qmp: Pick<Qmp, 'execute'>): Promise<void> => {
  const nodes = readNodes(await qmp.execute('query-named-block-nodes', { flat: true }))
  const recording = nodes.flatMap(({ bitmaps }) => bitmaps).filter(({ name, recording: records, busy }) => bitmapNumber(name) !== undefined && records && !busy)
  await qmp.execute('transaction', { actions: recording.map(({ node, name }) => ({ type: 'block-dirty-bitmap-enable', data: { node, name } })) })
}

/** Counters and disks, over one connection. */
export const lookAtVm = async (qmp: Pick<Qmp, 'execute'>, options: { drained: boolean }): Promise<VmLook> => {
  if (options.drained) await drain(qmp)
  const [stats, state] = await Promise.all([qmp.execute('query-blockstats'), queryBlockState(qmp)])
  return { counters: readDiskCounters(stats, state.jobs), sizes: new Map(describeDisks(state, stats).map(({ key, sizeBytes }) => [key, sizeBytes])), drained: options.drained }
}
