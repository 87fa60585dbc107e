import { asList, asObject, booleanField, countField, listField, objectField, optionalField, stringField } from '../../core/qmp/index.ts'
import type { JsonObject, Qmp } from '../../core/qmp/index.ts'
import { namesOf } from './names.ts'

export type BlockBitmap = { name: string; node: string; recording: boolean; busy: boolean; granularityBytes: number; dirtyBytes: number }
export type BlockJob = { id: string; /** 'mirror', 'backup', ... */ type: string; status: string; ready: boolean; paused: boolean; /** An error of its target has stopped it: nothing passes it any more. */ failed: boolean }
export type BlockNode = { name: string; driver: string; bitmaps: readonly BlockBitmap[]; /** What QEMU calls its file; of a node of the driver `file`, a path. */ file?: string; /** It shows what another image holds. */ hasBacking?: boolean }
export type BlockExport = { id: string; node: string; shuttingDown: boolean }

/** A guest device with a medium in it, as query-block tells it. */
export type BlockDevice = {
  /** 'scsi0', '/machine/peripheral/virtio0/virtio-backend'; '' when no device holds the drive. */
  qdev: string
  /** Proxmox's -drive id ('drive-scsi0'), '' with -blockdev. */
  backend: string
  rootNode: string
  sizeBytes: number
  readOnly: boolean
  removable: boolean
}

/** What is in a QEMU's block layer, read by four queries. */
export type BlockState = {
  devices: readonly BlockDevice[]
  nodes: readonly BlockNode[]
  jobs: readonly BlockJob[]
  exports: readonly BlockExport[]
}

const readBitmap = (node: string) => (value: unknown): BlockBitmap => {
  const bitmap = asObject(value, 'a dirty bitmap')
  return {
    name: optionalField(bitmap, 'name', stringField) ?? '', node, recording: booleanField(bitmap, 'recording'), busy: booleanField(bitmap, 'busy'),
    granularityBytes: countField(bitmap, 'granularity'), dirtyBytes: countField(bitmap, 'count'),
  }
}

const readNode = (value: unknown): BlockNode => {
  const node = asObject(value, 'a block node')
  const name = stringField(node, 'node-name')
  const file = optionalField(node, 'file', stringField)
  return {
    name, driver: stringField(node, 'drv'), bitmaps: (optionalField(node, 'dirty-bitmaps', listField) ?? []).map(readBitmap(name)),
    ...(file === undefined ? {} : { file }), hasBacking: (optionalField(node, 'backing_file_depth', countField) ?? 0) > 0,
  }
}

/** Answer of query-named-block-nodes. */
export const readNodes = (answer: unknown): BlockNode[] => asList(answer, 'query-named-block-nodes').map(readNode)

/** Answer of query-block; devices without a medium are left out. */
export const readDevices = (answer: unknown): BlockDevice[] =>
  asList(answer, 'query-block').flatMap((value): BlockDevice[] => {
    const device = asObject(value, 'a block device')
    const inserted = optionalField(device, 'inserted', objectField)
    if (!inserted) return []
    return [{
      qdev: optionalField(device, 'qdev', stringField) ?? '', backend: stringField(device, 'device'), removable: booleanField(device, 'removable'),
      rootNode: stringField(inserted, 'node-name'), readOnly: booleanField(inserted, 'ro'), sizeBytes: countField(objectField(inserted, 'image'), 'virtual-size'),
    }]
  })

/** Answer of query-block-jobs. */
export const readJobs = (answer: unknown): BlockJob[] =>
  asList(answer, 'query-block-jobs').map((value) => {
    const job = asObject(value, 'a block job')
    return { id: stringField(job, 'device'), type: stringField(job, 'type'), status: stringField(job, 'status'), ready: booleanField(job, 'ready'), paused: booleanField(job, 'paused'), failed: stringField(job, 'io-status') !== 'ok' }
  })

/** Answer of query-block-exports. */
export const readExports = (answer: unknown): BlockExport[] =>
  asList(answer, 'query-block-exports').map((value) => {
    const entry = asObject(value, 'a block export')
    return { id: stringField(entry, 'id'), node: stringField(entry, 'node-name'), shuttingDown: booleanField(entry, 'shutting-down') }
  })

const chainOf = (stats: JsonObject): string[] => {
  const name = optionalField(stats, 'node-name', stringField)
  const below = optionalField(stats, 'parent', objectField)
  return [...(name === undefined ? [] : [name]), ...(below ? chainOf(below) : [])]
}

/** Answer of query-blockstats: per qdev the nodes from the root down to the file (QEMU calls the child "parent" there). */
export const readChains = (answer: unknown): Map<string, string[]> => {
  const chains = new Map<string, string[]>()
  for (const value of asList(answer, 'query-blockstats')) {
    const stats = asObject(value, 'block statistics')
    const qdev = optionalField(stats, 'qdev', stringField)
    if (qdev !== undefined) chains.set(qdev, chainOf(stats))
  }
  return chains
}

/** The job of somebody else (backup, disk move) on a disk: Proxmox names it after the drive; a disk move on 9.x is 'mirror-scsi0'. */
export const foreignJobOn = (key: string, state: Pick<BlockState, 'jobs'>): BlockJob | undefined => state.jobs.find((job) => job.id === `drive-${key}` || job.id === `mirror-${key}`)

/**
 * The job of somebody else that does not let capture be attached to or taken from one of the disks. A backup is none on 9.x: it works
 * below the node that our job is on.
 */
export const blockingJob = (keys: readonly string[], state: Pick<BlockState, 'jobs' | 'nodes'>): { key: string; job: BlockJob } | undefined => {
  for (const key of keys) {
    const job = foreignJobOn(key, state)
    const isBlockdev = state.nodes.some(({ name }) => name === `drive-${key}`) && !state.nodes.some(({ name }) => name === namesOf(key).shield)
    if (job !== undefined && !(isBlockdev && job.type === 'backup')) return { key, job }
  }
  return undefined
}

export const queryBlockState = async (qmp: Pick<Qmp, 'execute'>): Promise<BlockState> => {
  const [devices, nodes, jobs, exports] = await Promise.all([
    qmp.execute('query-block'), qmp.execute('query-named-block-nodes', { flat: true }), qmp.execute('query-block-jobs'), qmp.execute('query-block-exports')])
  return { devices: readDevices(devices), nodes: readNodes(nodes), jobs: readJobs(jobs), exports: readExports(exports) }
}
