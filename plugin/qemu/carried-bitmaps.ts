import type { Qmp } from '../../core/qmp/index.ts'
import { addBitmapAction } from './attach-plan.ts'
import { readNodes } from './block-state.ts'
import type { BlockBitmap, BlockNode } from './block-state.ts'
import type { QemuDisk } from './disks.ts'
import { bitmapName, bitmapNumber, carriedClaim, carriedName } from './names.ts'

// Dirty bitmaps that a live migration takes along. What is remembered of a QEMU's bitmaps is remembered on its node; the next node has only what is in
// QEMU, so what is true of the bitmaps is said there, by the name of one more.

/** Below `coveredBytes`, by disk key, everything that is not in our bitmaps is durable at that recovery site, which holds everything up to `durableSeq`. */
export type Carried = { coveredBytes: Readonly<Record<string, number>>; agent: { id: string; durableSeq: number } }

type Action = { type: string; data: Readonly<Record<string, unknown>> }

const bitmapsOn = (disk: QemuDisk, nodes: readonly BlockNode[]): readonly BlockBitmap[] => nodes.find(({ name }) => name === disk.bitmapNode)?.bitmaps ?? []
const isRotating = ({ name }: BlockBitmap): boolean => bitmapNumber(name) !== undefined
const isCarried = ({ name }: BlockBitmap): boolean => carriedClaim(name) !== undefined

/** Pure: bitmaps that say what they are, with all that ours on these disks hold. A disk on which none of ours records gets none. */
export const planCarry = (disks: readonly QemuDisk[], carried: Carried, nodes: readonly BlockNode[]): Action[] =>
  disks.flatMap((disk): Action[] => {
    const bitmaps = bitmapsOn(disk, nodes)
    const ours = bitmaps.filter(isRotating)
    const coveredBytes = carried.coveredBytes[disk.key]
    if (coveredBytes === undefined || !ours.some(({ recording }) => recording) || bitmaps.some(isCarried)) return []
    const name = carriedName({ coveredBytes, agentId: carried.agent.id, durableSeq: carried.agent.durableSeq })
    return [addBitmapAction(disk, name), { type: 'block-dirty-bitmap-merge', data: { node: disk.bitmapNode, target: name, bitmaps: ours.map((bitmap) => bitmap.name) } }]
  })

/** Pure: carried bitmaps become ordinary ones, which record on without a gap. */
export const planTakeOver = (disks: readonly QemuDisk[], nodes: readonly BlockNode[]): Action[] =>
  disks.flatMap((disk): Action[] => {
    const bitmaps = bitmapsOn(disk, nodes)
    const carried = bitmaps.filter(isCarried)
    if (carried.length === 0) return []
    const node = disk.bitmapNode
    const name = bitmapName(Math.max(0, ...bitmaps.map((bitmap) => bitmapNumber(bitmap.name) ?? 0)) + 1)
    return [
      addBitmapAction(disk, name), { type: 'block-dirty-bitmap-merge', data: { node, target: name, bitmaps: carried.map((bitmap) => bitmap.name) } },
      ...carried.map((bitmap) => ({ type: 'block-dirty-bitmap-remove', data: { node, name: bitmap.name } })),
    ]
  })

const nodesOf = async (qmp: Pick<Qmp, 'execute'>): Promise<BlockNode[]> => readNodes(await qmp.execute('query-named-block-nodes', { flat: true }))

const perform = async (qmp: Pick<Qmp, 'execute'>, actions: readonly Action[]): Promise<void> => {
  if (actions.length > 0) await qmp.execute('transaction', { actions })
}

/** Before a live migration, with capture out of QEMU. */
export const carryBitmaps = async (qmp: Pick<Qmp, 'execute'>, disks: readonly QemuDisk[], carried: Carried): Promise<void> =>
  perform(qmp, planCarry(disks, carried, await nodesOf(qmp)))

/** What carried bitmaps say, as `carryBitmaps` was told; undefined if there are none. A disk counts only if its bitmap records, and none if they do not say the same of their recovery site. */
export const carriedWith = async (qmp: Pick<Qmp, 'execute'>, disks: readonly QemuDisk[]): Promise<Carried | undefined> => readCarried(disks, await nodesOf(qmp))

/** Pure: see carriedWith. */
export const readCarried = (disks: readonly QemuDisk[], nodes: readonly BlockNode[]): Carried | undefined => {
  const found = disks.flatMap((disk) => bitmapsOn(disk, nodes).flatMap((bitmap) => {
    const claim = carriedClaim(bitmap.name)
    return claim === undefined ? [] : [{ key: disk.key, recording: bitmap.recording, claim }]
  }))
  if (found.length === 0) return undefined
  const { agentId: id, durableSeq } = found[0].claim
  const isOne = found.every(({ claim }) => claim.agentId === id && claim.durableSeq === durableSeq)
  const covered = isOne ? found.filter(({ recording }) => recording) : []
  return { coveredBytes: Object.fromEntries(covered.map(({ key, claim }) => [key, claim.coveredBytes])), agent: { id, durableSeq } }
}

/** Ends what carried bitmaps say: from here on the memory of this node counts. In one transaction. */
export const takeOverBitmaps = async (qmp: Pick<Qmp, 'execute'>, disks: readonly QemuDisk[]): Promise<void> => perform(qmp, planTakeOver(disks, await nodesOf(qmp)))
