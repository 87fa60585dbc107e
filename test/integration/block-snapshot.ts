import { mkdir, open } from 'node:fs/promises'
import { setTimeout as pause } from 'node:timers/promises'
import type { Qmp } from '../../core/qmp/index.ts'
import { attachCapture, discoverDisks, readCounters } from '../../plugin/qemu/index.ts'
import type { AttachedDisk } from '../../plugin/qemu/index.ts'
import type { BareVm } from './bare-vm.ts'
import { startNbdkit } from './nbdkit-target.ts'
import type { NbdkitTarget } from './nbdkit-target.ts'

/** Everything of the block layer that we could change, as text to compare. */
export const blockSnapshot = async (qmp: Pick<Qmp, 'execute'>): Promise<string> => {
  const nodes = (await qmp.execute('query-named-block-nodes', { flat: true })) as { 'node-name': string; drv: string; 'dirty-bitmaps'?: { name?: string }[] }[]
  const devices = (await qmp.execute('query-block')) as { qdev?: string; inserted?: { 'node-name': string } }[]
  const jobs = (await qmp.execute('query-jobs')) as { id: string }[]
  const exports = (await qmp.execute('query-block-exports')) as { id: string }[]
  return JSON.stringify({
    nodes: nodes.map((node) => `${node['node-name']} ${node.drv} ${(node['dirty-bitmaps'] ?? []).map((bitmap) => bitmap.name ?? '-').join(',')}`).sort(),
    devices: devices.map((device) => `${device.qdev} ${device.inserted?.['node-name']}`).sort(), jobs: jobs.map((job) => job.id), exports: exports.map((entry) => entry.id).sort(),
  }, null, 1)
}

/** A target that holds a copy of each disk in a file of its own: `copyPath(dir of the VM, name, key)`. */
export const startFileTarget = async (vm: BareVm, name = 'target'): Promise<NbdkitTarget> => {
  await mkdir(`${vm.dir}/${name}.d`, { recursive: true })
  for (const { key, sizeBytes } of vm.disks) {
    await using file = await open(copyPath(vm, name, key), 'a')
    await file.truncate(sizeBytes)
  }
  return startNbdkit(vm.dir, name, ['file', `dir=${vm.dir}/${name}.d`])
}

export const copyPath = (vm: BareVm, name: string, key: string): string => `${vm.dir}/${name}.d/${key}`

export const attachAll = (vm: BareVm, socketPath: string): Promise<AttachedDisk[]> => vm.qmp(async (qmp) =>
  attachCapture(qmp, await discoverDisks(qmp), { nbdSocketPath: socketPath, exportNameOf: (key) => key }))

/** Waits until one of our bitmaps has seen that much written: the load runs. */
export const untilWritten = (vm: BareVm, wantedBytes: number): Promise<void> => vm.qmp(async (qmp) => {
  const endsAtMs = performance.now() + 60_000
  while (performance.now() < endsAtMs) {
    const nodes = (await qmp.execute('query-named-block-nodes', { flat: true })) as { 'dirty-bitmaps'?: { name?: string; count: number }[] }[]
    const dirty = nodes.flatMap((node) => node['dirty-bitmaps'] ?? []).filter((bitmap) => bitmap.name?.startsWith('cdp-bitmap-'))
    if (dirty.some((bitmap) => bitmap.count >= wantedBytes)) return
    await pause(20)
  }
  throw new Error('the load does not reach the disk')
})

/** Waits until the guest itself has written: the firmware has started its disk. */
export const untilGuestWrites = (vm: BareVm): Promise<void> => vm.qmp(async (qmp) => {
  const endsAtMs = performance.now() + 60_000
  while (performance.now() < endsAtMs) {
    if ([...(await readCounters(qmp)).values()].some(({ wrBytes }) => wrBytes > 0)) return
    await pause(20)
  }
  throw new Error('the guest does not write')
})
