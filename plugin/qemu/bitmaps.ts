import { CdpError } from '../../core/errors/index.ts'
import type { Qmp } from '../../core/qmp/index.ts'
import { addBitmapAction } from './attach-plan.ts'
import { readNodes } from './block-state.ts'
import type { BlockBitmap, BlockNode } from './block-state.ts'
import type { QemuDisk } from './disks.ts'
import { bitmapName, bitmapNumber } from './names.ts'

export type RotatedBitmaps = {
  key: string
  /** Records from now on. */
  current: string
  /** Stands still: everything written since the rotation before the last drop. Undefined when nothing was recorded before. */
  rotated: string | undefined
}

type Action = { type: string; data: Readonly<Record<string, unknown>> }

const oursOn = (disk: QemuDisk, nodes: readonly BlockNode[]): BlockBitmap[] =>
  (nodes.find((node) => node.name === disk.bitmapNode)?.bitmaps ?? [])
    .filter((bitmap) => bitmapNumber(bitmap.name) !== undefined)
    .sort((one, other) => (bitmapNumber(one.name) ?? 0) - (bitmapNumber(other.name) ?? 0))

/** Pure: the actions of one disk. The oldest of our bitmaps takes in all the others. */
export const planRotation = (disk: QemuDisk, nodes: readonly BlockNode[]): { actions: Action[]; result: RotatedBitmaps } => {
  const ours = oursOn(disk, nodes)
  const busy = ours.find((bitmap) => bitmap.busy)
  if (busy) {
    throw new CdpError('CONFLICT', `The dirty bitmap ${busy.name} of ${disk.key} is in use`, { retry: true, hint: 'Close the read export first.', context: { key: disk.key, bitmap: busy.name } })
  }
  const node = disk.bitmapNode
  const current = bitmapName((bitmapNumber(ours.at(-1)?.name ?? '') ?? 0) + 1)
  const [oldest, ...others] = ours
  const actions: Action[] = [addBitmapAction(disk, current)]
  for (const bitmap of ours) if (bitmap.recording) actions.push({ type: 'block-dirty-bitmap-disable', data: { node, name: bitmap.name } })
  if (oldest && others.length > 0) actions.push({ type: 'block-dirty-bitmap-merge', data: { node, target: oldest.name, bitmaps: others.map(({ name }) => name) } })
  for (const { name } of others) actions.push({ type: 'block-dirty-bitmap-remove', data: { node, name } })
  return { actions, result: { key: disk.key, current, rotated: oldest?.name } }
}

/**
 * In one transaction over all disks: a new bitmap records, what recorded stands still, and all that stand still become one.
 * @throws CdpError CONFLICT when one of them is exported.
 */
export const rotateBitmaps = async (qmp: Pick<Qmp, 'execute'>, disks: readonly QemuDisk[]): Promise<RotatedBitmaps[]> => {
  const nodes = readNodes(await qmp.execute('query-named-block-nodes', { flat: true }))
  const plans = disks.map((disk) => planRotation(disk, nodes))
  await qmp.execute('transaction', { actions: plans.flatMap(({ actions }) => actions) })
  return plans.map(({ result }) => result)
}

/** Removes the bitmaps that stand still, in one transaction, once their extents are durable at the recovery site. Idempotent. */
export const dropRotated = async (qmp: Pick<Qmp, 'execute'>, disks: readonly QemuDisk[]): Promise<string[]> => {
  const nodes = readNodes(await qmp.execute('query-named-block-nodes', { flat: true }))
  const still = disks.flatMap((disk) => oursOn(disk, nodes).filter((bitmap) => !bitmap.recording))
  if (still.length > 0) {
    await qmp.execute('transaction', { actions: still.map(({ node, name }) => ({ type: 'block-dirty-bitmap-remove', data: { node, name } })) })
  }
  return still.map(({ node, name }) => `${node}/${name}`)
}

/** Keys of the disks on which a bitmap of ours records. */
export const recordingKeys = async (qmp: Pick<Qmp, 'execute'>, disks: readonly QemuDisk[]): Promise<Set<string>> => {
  const nodes = readNodes(await qmp.execute('query-named-block-nodes', { flat: true }))
  return new Set(disks.filter((disk) => oursOn(disk, nodes).some(({ recording }) => recording)).map(({ key }) => key))
}
