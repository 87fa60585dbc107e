import { isAbsolute } from 'node:path'
import { CdpError } from '../../core/errors/index.ts'
import type { Qmp } from '../../core/qmp/index.ts'
import { queryBlockState, readChains } from './block-state.ts'
import type { BlockDevice, BlockNode, BlockState } from './block-state.ts'
import { isOurs } from './names.ts'

/** '8.4': -drive, the root is the format node. '9.x': -blockdev with a throttle node on top. */
export type GraphShape = '8.4' | '9.x' | 'unknown'

/** The one file that holds all of a disk. `raw`: nothing but the guest's own data. */
export type DiskImage = { path: string; raw: boolean }

/** A disk of a running VM, described as it is without us: nodes of ours and filters of running jobs are skipped. */
export type QemuDisk = {
  /** Proxmox's name: 'scsi0', 'virtio1'. */
  key: string
  qdev: string
  /** Object whose `drive` property names the guest's root node. */
  qomPath: string
  shape: GraphShape
  sizeBytes: number
  /** The guest's root node without us. */
  rootNode: string
  formatNode: string
  throttleNode: string | undefined
  /** Where our dirty bitmap sits: the node below our job. */
  bitmapNode: string
  /** What bulk reads go to: below our job, below the guest's throttle. */
  readNode: string
  /** Undefined for a block device, an image with a backing file, and whatever else is no single file. */
  image?: DiskImage
  /** Object id of the disk's iothread. */
  iothread: string | undefined
}

const keyPattern = /^(?:scsi|virtio|sata|ide)[0-9]{1,2}$/
const oldestMajor = 9
// Filters that QEMU's jobs put into a graph for as long as they run.
const jobFilters: readonly string[] = ['copy-before-write', 'mirror_top', 'commit_top', 'preallocate', 'copy-on-read']

/** 'scsi0' of 'scsi0' and of '/machine/peripheral/scsi0/virtio-backend'; undefined for what is no disk of Proxmox's naming. */
export const keyOfQdev = (qdev: string): string | undefined => {
  const key = /^\/machine\/peripheral\/([^/]+)/.exec(qdev)?.[1] ?? qdev
  return keyPattern.test(key) ? key : undefined
}

/** The object whose `drive` property names the root node of a device. */
export const qomPathOf = (qdev: string): string => (qdev.startsWith('/') ? qdev : `/machine/peripheral/${qdev}`)

const imageOf = (nodes: readonly (BlockNode | undefined)[]): DiskImage | undefined => {
  const storage = nodes.at(-1)
  if (storage?.driver !== 'file' || storage.file === undefined || !isAbsolute(storage.file) || nodes.some((node) => node?.hasBacking === true)) return undefined
  return { path: storage.file, raw: nodes.slice(0, -1).every((node) => node?.driver === 'raw' || node?.driver === 'throttle') }
}

/** Pure: the disk behind a device, from its nodes top down. Undefined if it is none that can be protected. */
export const describeDisk = (device: BlockDevice, chain: readonly string[], state: Pick<BlockState, 'nodes'>): Omit<QemuDisk, 'iothread'> | undefined => {
  const key = keyOfQdev(device.qdev)
  if (key === undefined || device.removable || device.readOnly) return undefined
  const nodes = chain.filter((name) => !isOurs(name)).map((name) => ({ name, driver: state.nodes.find((node) => node.name === name)?.driver ?? '' }))
    .filter(({ driver }) => !jobFilters.includes(driver))
  const [root, below] = nodes
  if (!root) return undefined
  const throttle = root.driver === 'throttle' ? root : undefined
  const format = throttle ? below : root
  const image = imageOf(nodes.map(({ name }) => state.nodes.find((node) => node.name === name)))
  if (!format) return undefined
  const shape = throttle ? (device.backend === '' ? '9.x' : 'unknown') : device.backend === '' ? 'unknown' : '8.4'
  return {
    key, qdev: device.qdev, qomPath: qomPathOf(device.qdev), shape, sizeBytes: device.sizeBytes,
    rootNode: root.name, formatNode: format.name, throttleNode: throttle?.name, bitmapNode: root.name, readNode: format.name,
    ...(image === undefined ? {} : { image }),
  }
}

/** Pure: all disks that can be protected, from the state and the answer of query-blockstats. */
export const describeDisks = (state: Pick<BlockState, 'nodes' | 'devices'>, stats: unknown): Omit<QemuDisk, 'iothread'>[] => {
  const chains = readChains(stats)
  return state.devices.flatMap((device) => describeDisk(device, chains.get(device.qdev) ?? [], state) ?? [])
}

/**
 * The writable disks of a VM, attached or not; CD-ROMs, firmware variables and read-only media are left out.
 * @throws CdpError QEMU_TOO_OLD below QEMU 9.0; QMP_*.
 */
export const discoverDisks = async (qmp: Pick<Qmp, 'execute' | 'version'>): Promise<QemuDisk[]> => {
  requireVersion(qmp)
  const [state, stats] = await Promise.all([queryBlockState(qmp), qmp.execute('query-blockstats')])
  const found = describeDisks(state, stats)
  const disks = await Promise.all(found.map(async (disk) => ({ ...disk, iothread: await findIoThread(qmp, disk.key) })))
  return disks.sort((one, other) => (one.key < other.key ? -1 : 1))
}

/** @throws CdpError QEMU_TOO_OLD */
export const requireVersion = (qmp: Pick<Qmp, 'version'>): void => {
  const { major, minor, micro } = qmp.version
  if (major >= oldestMajor) return
  throw new CdpError('QEMU_TOO_OLD', `This VM runs QEMU ${major}.${minor}.${micro}; protection needs QEMU ${oldestMajor}.0 or newer`, {
    hint: 'Update the node, then stop and start the VM (or migrate it), so that it runs on the new QEMU.', context: { major, minor, micro },
  })
}

const readLink = async (qmp: Pick<Qmp, 'execute'>, path: string, property: string): Promise<string | undefined> => {
  try {
    const value = await qmp.execute('qom-get', { path, property })
    return typeof value === 'string' && value !== '' ? value : undefined
  } catch (error) {
    if (error instanceof CdpError && error.code === 'QMP_COMMAND') return undefined
    throw error
  }
}

// A virtio-blk device has its own iothread; a SCSI disk runs in the one of its controller.
const findIoThread = async (qmp: Pick<Qmp, 'execute'>, key: string): Promise<string | undefined> => {
  const ofDisk = await readLink(qmp, `/machine/peripheral/${key}`, 'iothread')
  const bus = ofDisk === undefined ? await readLink(qmp, `/machine/peripheral/${key}`, 'parent_bus') : undefined
  const controller = /^\/machine\/peripheral\/[^/]+/.exec(bus ?? '')?.[0]
  const link = ofDisk ?? (controller === undefined ? undefined : await readLink(qmp, controller, 'iothread'))
  return link?.split('/').at(-1)
}
