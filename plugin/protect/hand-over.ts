import { withQmp } from '../../core/qmp/index.ts'
import { carryBitmaps, discoverDisks, takeOverBitmaps } from '../qemu/index.ts'
import type { Carried, QemuDisk } from '../qemu/index.ts'
import type { RunningVm } from './vm-files.ts'
import type { VmMemoryFile } from './vm-memory.ts'

// A VM on its way from node to node, as far as its QEMU is concerned (docs/decisions/live-migration.md). Capture is out of it.

const QMP_DEADLINE_MS = 5_000

/** What the memory of this node says of the VM's bitmaps goes with it: the next node can go on from there, if QEMU takes bitmaps along. */
export const handOver = async (vm: RunningVm, memory: VmMemoryFile): Promise<void> => {
  const known = await memory.read(vm.instance)
  if (known?.bitmaps !== 'covered' || known.disks === undefined || known.agent === undefined) return
  const carried = { coveredBytes: known.disks, agent: known.agent }
  await withQmp(vm.qmpPath, { deadlineMs: QMP_DEADLINE_MS }, async (qmp) => carryBitmaps(qmp, await discoverDisks(qmp), carried))
}

/**
 * Bitmaps that another node handed over are this node's from now on. Where this node remembers that QEMU already (a migration that did not come about,
 * or a plugin that died in the middle of this), what it remembers counts.
 */
export const takeOver = async (vm: RunningVm, disks: readonly QemuDisk[], carried: Carried | undefined, memory: VmMemoryFile): Promise<void> => {
  if (carried === undefined) return
  if ((await memory.read(vm.instance)) === undefined) await memory.takeOver(vm.instance, carried)
  await withQmp(vm.qmpPath, { deadlineMs: QMP_DEADLINE_MS }, (qmp) => takeOverBitmaps(qmp, disks))
}
