import { open } from 'node:fs/promises'
import { setTimeout as pause } from 'node:timers/promises'
import { asList, asObject, stringField } from '../../core/qmp/index.ts'
import type { QmpClient } from '../../core/qmp/index.ts'
import type { BareVm } from './bare-vm.ts'

// What Proxmox's own code asks of a QEMU over QMP, in its order, with its names (qemu-server 9.2.6: QemuServer.pm, QemuServer/BlockJob.pm,
// QemuServer/Blockdev.pm; 8.4.21 where it differs). Each is an operation as a user knows it, without what it does to volumes and configuration.

const POLL_MS = 50
const DEADLINE_MS = 30_000

const query = async (qmp: QmpClient, command: string, args = {}): Promise<Record<string, unknown>[]> => asList(await qmp.execute(command, args), command).map((one) => asObject(one, command))

/** The guest's root node, as query-block tells it (get_block_info). */
const insertedOf = async (qmp: QmpClient, key: string): Promise<string> => {
  const device = (await query(qmp, 'query-block')).find(({ qdev }) => typeof qdev === 'string' && qdev.split('/').includes(key))
  return stringField(asObject(device?.['inserted'], 'inserted'), 'node-name')
}

/** get_node_name_below_throttle, which reads `children` of query-named-block-nodes; Debian's QEMU 10.0 does not tell them. */
const belowThrottle = async (qmp: QmpClient, key: string): Promise<string> => {
  const device = (await query(qmp, 'query-blockstats')).find(({ qdev }) => typeof qdev === 'string' && qdev.split('/').includes(key))
  let node = device
  while (node !== undefined && node['node-name'] !== `drive-${key}`) node = asObject(node['parent'], 'a node')
  return stringField(asObject(node?.['parent'], 'the node below the throttle'), 'node-name')
}

const jobOf = async (qmp: QmpClient, id: string): Promise<Record<string, unknown> | undefined> => (await query(qmp, 'query-block-jobs')).find(({ device }) => device === id)

const untilJob = async (vm: BareVm, id: string, done: (job: Record<string, unknown> | undefined) => boolean): Promise<void> => {
  const endsAtMs = performance.now() + DEADLINE_MS
  // A connection for each look, as Proxmox does it.
  while (!(await vm.qmp(async (qmp) => done(await jobOf(qmp, id))))) {
    if (performance.now() > endsAtMs) throw new Error(`the job ${id} does not come to its end`)
    await pause(POLL_MS)
  }
}

export const snapshot = (vm: BareVm, key: string, name: string): Promise<unknown> => vm.qmp((qmp) => qmp.execute('blockdev-snapshot-internal-sync', { device: `drive-${key}`, name }))
export const deleteSnapshot = (vm: BareVm, key: string, name: string): Promise<unknown> => vm.qmp((qmp) => qmp.execute('blockdev-snapshot-delete-internal-sync', { device: `drive-${key}`, name }))

export const resize = (vm: BareVm, key: string, sizeBytes: number): Promise<unknown> =>
  vm.qmp(async (qmp) => qmp.execute('block_resize', { 'node-name': await insertedOf(qmp, key), size: sizeBytes }))

const truncated = async (path: string, sizeBytes: number): Promise<void> => {
  await using file = await open(path, 'w')
  await file.truncate(sizeBytes)
}

type Mirror = { job: string; sourceNode: string | undefined; targetNode: string | undefined }

/** The mirror job of a disk move or a clone, up to READY. */
const startMirror = async (vm: BareVm, key: string, path: string, sizeBytes: number): Promise<Mirror> => {
  await truncated(path, sizeBytes)
  const options = { device: `drive-${key}`, sync: 'full', 'auto-dismiss': false }
  const mirror = await vm.qmp(async (qmp): Promise<Mirror> => {
    if (vm.shape === '8.4') {
      await qmp.execute('drive-mirror', { ...options, target: path, mode: 'existing', format: 'raw' })
      return { job: `drive-${key}`, sourceNode: undefined, targetNode: undefined }
    }
    const sourceNode = await belowThrottle(qmp, key)
    const targetNode = `f-${path.split('/').at(-1)}`
    await qmp.execute('blockdev-add', { driver: 'raw', 'node-name': targetNode, file: { driver: 'file', 'node-name': `e-${path.split('/').at(-1)}`, filename: path, aio: 'io_uring', cache: { direct: true, 'no-flush': false } } })
    await qmp.execute('blockdev-mirror', { ...options, target: targetNode, 'job-id': `mirror-${key}`, replaces: sourceNode })
    return { job: `mirror-${key}`, sourceNode, targetNode }
  })
  await untilJob(vm, mirror.job, (job) => job?.['ready'] === true)
  return mirror
}

const dismiss = async (vm: BareVm, job: string): Promise<void> => {
  await untilJob(vm, job, (found) => found === undefined || found['status'] === 'concluded')
  await vm.qmp(async (qmp) => {
    const found = await jobOf(qmp, job)
    if (found === undefined) return
    await qmp.execute('job-dismiss', { id: job })
    if (found['error'] !== undefined) throw new Error(`${job}: ${JSON.stringify(found['error'])}`)
  })
}

/** Blockdev::detach: the node and, when they are named, its children. */
const detachNode = (vm: BareVm, node: string): Promise<void> => vm.qmp(async (qmp) => {
  const file = (await query(qmp, 'query-named-block-nodes')).find((one) => one['node-name'] === node)
  if (file === undefined) return
  await qmp.execute('blockdev-del', { 'node-name': node })
})

/** qm disk move: the guest goes on on the new volume. */
export const moveDisk = async (vm: BareVm, key: string, path: string, sizeBytes: number): Promise<void> => {
  const { job, sourceNode } = await startMirror(vm, key, path, sizeBytes)
  await vm.qmp((qmp) => qmp.execute('job-complete', { id: job }))
  await dismiss(vm, job)
  if (sourceNode !== undefined) await detachNode(vm, sourceNode)
}

/** qm clone --full of a running VM: a copy, and the guest stays where it is. */
export const cloneDisk = async (vm: BareVm, key: string, path: string, sizeBytes: number): Promise<void> => {
  const { job, targetNode } = await startMirror(vm, key, path, sizeBytes)
  await vm.qmp((qmp) => qmp.execute('block-job-cancel', { device: job }))
  await dismiss(vm, job)
  if (targetNode !== undefined) await detachNode(vm, targetNode)
}

export type Backup = { end: () => Promise<void>; done: () => Promise<void>; hurry: () => Promise<unknown> }

/** vzdump in snapshot mode, which addresses the guest's root node on 8.4 and the node below the throttle on 9.x. `end` cancels it, `done` waits for its end, `hurry` takes the limit off. `path`: where it goes to, else nowhere. */
export const startBackup = async (vm: BareVm, key: string, options: { sizeBytes: number; bytesPerSec?: number; path?: string }): Promise<Backup> => {
  const job = `drive-${key}`
  const archive = `archive-${key}`
  const remove = (): Promise<unknown> => vm.qmp((qmp) => qmp.execute('blockdev-del', { 'node-name': archive }))
  if (options.path !== undefined) await truncated(options.path, options.sizeBytes)
  await vm.qmp(async (qmp) => {
    await qmp.execute('blockdev-add', options.path === undefined
      ? { driver: 'null-co', 'node-name': archive, size: options.sizeBytes }
      : { driver: 'raw', 'node-name': archive, file: { driver: 'file', filename: options.path } })
    const device = await (vm.shape === '8.4' ? insertedOf(qmp, key) : belowThrottle(qmp, key))
    await qmp.execute('blockdev-backup', { 'job-id': job, device, target: archive, sync: 'full', ...(options.bytesPerSec === undefined ? {} : { speed: options.bytesPerSec }) })
  })
  const gone = (): Promise<void> => untilJob(vm, job, (found) => found === undefined)
  return {
    end: async () => {
      await vm.qmp((qmp) => qmp.execute('block-job-cancel', { device: job, force: true }))
      await gone()
      await remove()
    },
    hurry: () => vm.qmp((qmp) => qmp.execute('block-job-set-speed', { device: job, speed: 0 })),
    done: async () => {
      await gone()
      await remove()
    },
  }
}

/** Hot-unplug of a disk (vm_deviceunplug): the device, then its drive. */
export const unplug = async (vm: BareVm, key: string): Promise<void> => {
  await vm.qmp(async (qmp) => {
    await qmp.execute('device_del', { id: key })
    await qmp.waitForEvent((event) => event.event === 'DEVICE_DELETED' && event.data['device'] === key, { deadlineMs: 10_000 })
    if (vm.shape === '8.4') {
      const left = (await query(qmp, 'query-block')).some(({ device }) => device === `drive-${key}`)
      if (left) await qmp.execute('human-monitor-command', { 'command-line': `drive_del drive-${key}` })
    } else {
      await qmp.execute('blockdev-del', { 'node-name': `drive-${key}` })
      await qmp.execute('object-del', { id: `throttle-drive-${key}` })
    }
  })
}

/** Hot-plug of a SCSI disk behind the controller that the VM has for that number already. @param drive what QEMU opens; only in the shape of 8.4 something else than the file */
export const plug = async (vm: BareVm, key: string, path: string, sizeBytes: number, fill?: (path: string) => Promise<void>, drive = path): Promise<void> => {
  await truncated(path, sizeBytes)
  await fill?.(path)
  await vm.qmp(async (qmp) => {
    if (vm.shape === '8.4') {
      await qmp.execute('human-monitor-command', { 'command-line': `drive_add auto "file=${drive},if=none,id=drive-${key},format=raw,cache=none,aio=io_uring,detect-zeroes=on"` })
    } else {
      await qmp.execute('object-add', { 'qom-type': 'throttle-group', id: `throttle-drive-${key}` })
      await qmp.execute('blockdev-add', {
        driver: 'throttle', 'node-name': `drive-${key}`, 'throttle-group': `throttle-drive-${key}`,
        file: { driver: 'raw', 'node-name': `f-${key}`, file: { driver: 'file', 'node-name': `e-${key}`, filename: path, aio: 'io_uring', cache: { direct: true, 'no-flush': false } } },
      })
    }
    await qmp.execute('device_add', { driver: 'scsi-hd', id: key, bus: `virtioscsi${key.slice(4)}.0`, drive: `drive-${key}`, 'share-rw': true })
  })
}

/** An I/O limit set on a running VM (set_io_throttle). */
export const throttle = (vm: BareVm, key: string, bytesPerSec: number): Promise<unknown> =>
  vm.qmp((qmp) => (vm.shape === '8.4'
    ? qmp.execute('block_set_io_throttle', { device: `drive-${key}`, bps: bytesPerSec, bps_rd: 0, bps_wr: 0, iops: 0, iops_rd: 0, iops_wr: 0 })
    : qmp.execute('qom-set', { path: `throttle-drive-${key}`, property: 'limits', value: { 'bps-total': bytesPerSec } })))
