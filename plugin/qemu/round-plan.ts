import { CdpError } from '../../core/errors/index.ts'
import { addBitmapAction } from './attach-plan.ts'
import type { BlockState } from './block-state.ts'
import type { QemuDisk } from './disks.ts'
import { bitmapName, bitmapNumber, roundNamesOf } from './names.ts'

// An incremental round as data: docs/decisions/incremental-rounds.md.

export type QmpCommand = { command: string; args: Readonly<Record<string, unknown>> }
type Action = { type: string; data: Readonly<Record<string, unknown>> }

export type RoundPlan = {
  /** One after the other; nothing of the guest's changes by them. */
  prepare: readonly QmpCommand[]
  /** The instant of the round. */
  transaction: QmpCommand
  /** Once the round is durable at the agent, these say nothing any more. */
  covered: readonly { node: string; name: string }[]
}

/** `bytesPerSec` of each disk's job; 0: no limit. */
export type RoundTarget = { nbdSocketPath: string; exportNameOf: (key: string) => string; bytesPerSec: number }

/** @throws CdpError CONFLICT when a disk has no bitmap of ours that records, or one of them is in use */
export const planRound = (disks: readonly QemuDisk[], state: Pick<BlockState, 'nodes'>, target: RoundTarget): RoundPlan => {
  const parts = disks.map((disk) => planDisk(disk, state, target))
  return {
    prepare: parts.flatMap(({ prepare }) => prepare),
    // Bitmaps first: what a new one records must begin no later than any disk's instant.
    transaction: { command: 'transaction', args: { actions: [...parts.flatMap(({ bitmaps }) => bitmaps), ...parts.map(({ backup }) => backup)] } },
    covered: parts.map(({ covered }) => covered),
  }
}

type DiskPlan = { prepare: QmpCommand[]; bitmaps: Action[]; backup: Action; covered: { node: string; name: string } }

const planDisk = (disk: QemuDisk, { nodes }: Pick<BlockState, 'nodes'>, target: RoundTarget): DiskPlan => {
  const { key, bitmapNode: node } = disk
  const names = roundNamesOf(key)
  const ours = (nodes.find(({ name }) => name === node)?.bitmaps ?? [])
    .map((bitmap) => ({ ...bitmap, number: bitmapNumber(bitmap.name) ?? 0 })).filter(({ number }) => number > 0)
    .sort((one, other) => one.number - other.number)
  const oldest = ours.find(({ recording }) => recording)
  if (oldest === undefined || ours.some(({ busy }) => busy)) {
    throw new CdpError('CONFLICT', `${key} has no dirty bitmap that a round could use`, { retry: true, context: { key, bitmaps: ours.map(({ name }) => name).join(', ') } })
  }
  const others = ours.filter((bitmap) => bitmap !== oldest)
  const merge = { type: 'block-dirty-bitmap-merge', data: { node, target: oldest.name, bitmaps: others.map(({ name }) => name) } }
  const next = bitmapName((ours.at(-1)?.number ?? 0) + 1)
  return {
    prepare: [
      { command: 'blockdev-add', args: { driver: 'nbd', 'node-name': names.target, server: { type: 'unix', path: target.nbdSocketPath }, export: target.exportNameOf(key), 'reconnect-delay': 0 } },
      { command: 'blockdev-add', args: { driver: 'null-co', 'node-name': names.sink, size: disk.sizeBytes } },
      // A failed copy would fail the write of the guest that caused it. So one of the two is enough.
      { command: 'blockdev-add', args: { driver: 'quorum', 'node-name': names.either, children: [names.target, names.sink], 'vote-threshold': 1 } },
    ],
    bitmaps: [
      ...(others.length === 0 ? [] : [merge]), ...others.map(({ name }) => ({ type: 'block-dirty-bitmap-remove', data: { node, name } })), addBitmapAction(disk, next),
    ],
    backup: {
      type: 'blockdev-backup',
      data: {
        'job-id': names.job, device: node, target: names.either, sync: 'bitmap', bitmap: oldest.name, 'bitmap-mode': 'never', speed: target.bytesPerSec,
        'on-source-error': 'report', 'on-target-error': 'report', 'auto-dismiss': false, 'filter-node-name': names.filter,
      },
    },
    covered: { node, name: oldest.name },
  }
}
