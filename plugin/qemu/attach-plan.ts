import { CdpError } from '../../core/errors/index.ts'
import { blockingJob } from './block-state.ts'
import type { BlockState } from './block-state.ts'
import type { QemuDisk } from './disks.ts'
import { bitmapName, bitmapNumber, isOurs, keyOfName, namesOf } from './names.ts'

/** One step of an attach, as data. `key` is the disk it belongs to, '' for steps of the whole VM. */
export type AttachStep =
  | { is: 'command'; key: string; command: string; args: Readonly<Record<string, unknown>> }
  | { is: 'wait-ready'; key: string; job: string }
  | { is: 'wait-standby'; key: string; job: string }

export type AttachPlan = { steps: readonly AttachStep[]; bitmaps: ReadonlyMap<string, string> }

export type AttachTarget = { nbdSocketPath: string; exportNameOf: (key: string) => string }

export const bitmapGranularityBytes = 65536
// 64 KiB, the default, makes neighbouring small writes wait for each other; 4 KiB is possible up to 1 TiB of disk.
const jobGranularityBytes = (sizeBytes: number): number => (sizeBytes <= 2 ** 40 ? 4096 : 65536)

/** The bitmap of ours that records on a disk, else the name for a new one. */
export const currentBitmap = (disk: QemuDisk, state: Pick<BlockState, 'nodes'>): { name: string; exists: boolean } => {
  const ours = (state.nodes.find((node) => node.name === disk.bitmapNode)?.bitmaps ?? [])
    .map((bitmap) => ({ ...bitmap, number: bitmapNumber(bitmap.name) ?? 0 }))
    .filter((bitmap) => bitmap.number > 0)
    .sort((one, other) => other.number - one.number)
  const recording = ours.find((bitmap) => bitmap.recording)
  return recording ? { name: recording.name, exists: true } : { name: bitmapName((ours[0]?.number ?? 0) + 1), exists: false }
}

export const addBitmapAction = (disk: QemuDisk, name: string) => ({
  type: 'block-dirty-bitmap-add', data: { node: disk.bitmapNode, name, persistent: false, granularity: bitmapGranularityBytes } })

const refuse = (disk: QemuDisk, why: string, hint: string, retry = false): never => {
  throw new CdpError('CONFLICT', `Capture cannot be attached to ${disk.key}: ${why}`, { hint, retry, context: { key: disk.key } })
}

/**
 * The steps that attach capture to `disks`, from the state of the VM's block layer. Bitmaps first, in one transaction: they
 * tell what is missed before READY and after a loss. On 8.4 the shield follows: pause, standby, add, re-point, resume.
 * @throws CdpError CONFLICT when something of ours is attached already, or a foreign job holds a disk.
 */
export const planAttach = (disks: readonly QemuDisk[], state: BlockState, target: AttachTarget): AttachPlan => {
  for (const disk of disks) {
    const names = namesOf(disk.key)
    const mine = [...state.jobs.map((job) => job.id), ...state.nodes.map((node) => node.name)].find((name) => isOurs(name) && keyOfName(name) === disk.key)
    if (mine !== undefined) refuse(disk, `${mine} is there already`, 'Detach first, or repair what an earlier run left.')
    if (blockingJob([disk.key], state)) refuse(disk, 'a backup, a disk move or another block job runs on it', 'Wait until that operation has ended.', true)
    if (names.target.length > 31) refuse(disk, 'its name is too long', 'QEMU takes node names of up to 31 characters.')
  }
  const bitmaps = new Map(disks.map((disk) => [disk.key, currentBitmap(disk, state)]))
  const missing = disks.flatMap((disk) => {
    const bitmap = bitmaps.get(disk.key)
    return bitmap && !bitmap.exists ? [addBitmapAction(disk, bitmap.name)] : []
  })
  const steps: AttachStep[] = missing.length === 0 ? [] : [{ is: 'command', key: '', command: 'transaction', args: { actions: missing } }]
  for (const disk of disks) steps.push(addTarget(disk, target))
  for (const disk of disks) steps.push(startMirror(disk))
  for (const disk of disks) steps.push({ is: 'wait-ready', key: disk.key, job: namesOf(disk.key).job })
  for (const disk of disks) if (disk.shape === '8.4') steps.push(...raiseShield(disk))
  return { steps, bitmaps: new Map([...bitmaps].map(([key, bitmap]) => [key, bitmap.name])) }
}

const addTarget = ({ key }: QemuDisk, target: AttachTarget): AttachStep => ({
  is: 'command', key, command: 'blockdev-add',
  args: {
    driver: 'nbd', 'node-name': namesOf(key).target, server: { type: 'unix', path: target.nbdSocketPath }, export: target.exportNameOf(key), 'reconnect-delay': 0,
  },
})

// A job whose target dies stands still and is ended by us (see detach.ts). One that ended by itself (`report`) would do so in the middle of whatever
// drains QEMU just then, also of a job that dies beside it: QEMU 10.0 was seen to abort and to corrupt its memory.
const startMirror = ({ key, rootNode, sizeBytes }: QemuDisk): AttachStep => ({
  is: 'command', key, command: 'blockdev-mirror',
  args: {
    'job-id': namesOf(key).job, device: rootNode, target: namesOf(key).target, sync: 'none', 'copy-mode': 'write-blocking', 'on-target-error': 'stop',
    granularity: jobGranularityBytes(sizeBytes), 'filter-node-name': namesOf(key).filter,
  },
})

const raiseShield = ({ key, qomPath }: QemuDisk): AttachStep[] => {
  const { job, shield, filter } = namesOf(key)
  return [
    { is: 'command', key, command: 'job-pause', args: { id: job } },
    { is: 'wait-standby', key, job },
    { is: 'command', key, command: 'blockdev-add', args: { driver: 'raw', 'node-name': shield, file: filter } },
    // While the job is paused it cannot end: see detach.ts.
    { is: 'command', key, command: 'qom-set', args: { path: qomPath, property: 'drive', value: shield } },
    { is: 'command', key, command: 'job-resume', args: { id: job } },
  ]
}
