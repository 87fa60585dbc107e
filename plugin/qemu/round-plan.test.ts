import { expect, test } from '@jest/globals'
import type { BlockBitmap } from './block-state.ts'
import type { QemuDisk } from './disks.ts'
import { keyOfName, keyOfRoundName, roundNamesOf } from './names.ts'
import { planRound } from './round-plan.ts'

const disk = (key: string): QemuDisk => {
  const node = `#block-${key}`
  return { key, shape: '8.4', qdev: key, qomPath: `/machine/peripheral/${key}`, sizeBytes: 2 ** 30, iothread: undefined, rootNode: node, formatNode: node, throttleNode: undefined, bitmapNode: node, readNode: node }
}
const bitmap = (key: string, name: string, more: Partial<BlockBitmap> = {}): BlockBitmap => ({ name, node: `#block-${key}`, recording: true, busy: false, granularityBytes: 65536, dirtyBytes: 0, ...more })
const nodesOf = (...bitmaps: BlockBitmap[]) => [...new Set(bitmaps.map(({ node }) => node))].map((name) => ({ name, driver: 'raw', bitmaps: bitmaps.filter(({ node }) => node === name) }))
const target = { nbdSocketPath: '/run/t', exportNameOf: (key: string) => key, bytesPerSec: 1000 }
const actionsOf = (plan: ReturnType<typeof planRound>) => plan.transaction.args['actions'] as { type: string; data: Record<string, unknown> }[]

test('one transaction over all disks: new bitmaps record before the first job freezes what it copies', () => {
  const plan = planRound([disk('scsi0'), disk('scsi1')], { nodes: nodesOf(bitmap('scsi0', 'cdp-bitmap-3'), bitmap('scsi1', 'cdp-bitmap-3')) }, target)
  expect(actionsOf(plan).map(({ type, data }) => `${type} ${String(data['name'] ?? data['device'])}`)).toEqual([
    'block-dirty-bitmap-add cdp-bitmap-4', 'block-dirty-bitmap-add cdp-bitmap-4', 'blockdev-backup #block-scsi0', 'blockdev-backup #block-scsi1'])
  expect(actionsOf(plan)[2].data).toMatchObject({ 'job-id': 'cdp-round-job-scsi0', target: 'cdp-round-either-scsi0', sync: 'bitmap', bitmap: 'cdp-bitmap-3', 'bitmap-mode': 'never', 'auto-dismiss': false, speed: 1000 })
  expect(plan.covered).toEqual([{ node: '#block-scsi0', name: 'cdp-bitmap-3' }, { node: '#block-scsi1', name: 'cdp-bitmap-3' }])
})

test('a copy that fails fails no write of the guest: the job writes to two nodes, of which one is enough', () => {
  const { prepare } = planRound([disk('scsi0')], { nodes: nodesOf(bitmap('scsi0', 'cdp-bitmap-1')) }, target)
  expect(prepare.map(({ args }) => [args['driver'], args['node-name']])).toEqual([['nbd', 'cdp-round-target-scsi0'], ['null-co', 'cdp-round-sink-scsi0'], ['quorum', 'cdp-round-either-scsi0']])
  expect(prepare[0].args).toMatchObject({ 'reconnect-delay': 0, server: { path: '/run/t' } })
  expect(prepare[2].args).toMatchObject({ 'vote-threshold': 1, children: ['cdp-round-target-scsi0', 'cdp-round-sink-scsi0'] })
})

test('whatever an earlier round, rotation or sync left becomes part of the one that still records', () => {
  const left = nodesOf(bitmap('scsi0', 'cdp-bitmap-2', { recording: false }), bitmap('scsi0', 'cdp-bitmap-3'), bitmap('scsi0', 'cdp-bitmap-5'), bitmap('scsi0', 'theirs'))
  const plan = planRound([disk('scsi0')], { nodes: left }, target)
  expect(actionsOf(plan).slice(0, -1)).toMatchObject([
    { type: 'block-dirty-bitmap-merge', data: { target: 'cdp-bitmap-3', bitmaps: ['cdp-bitmap-2', 'cdp-bitmap-5'] } }, { type: 'block-dirty-bitmap-remove', data: { name: 'cdp-bitmap-2' } },
    { type: 'block-dirty-bitmap-remove', data: { name: 'cdp-bitmap-5' } }, { type: 'block-dirty-bitmap-add', data: { name: 'cdp-bitmap-6' } }])
  expect(plan.covered).toEqual([{ node: '#block-scsi0', name: 'cdp-bitmap-3' }])
})

test('a disk of which no bitmap says all is refused, as is one whose bitmap is in use', () => {
  for (const nodes of [[], nodesOf(bitmap('scsi0', 'cdp-bitmap-1', { recording: false })), nodesOf(bitmap('scsi0', 'cdp-bitmap-1'), bitmap('scsi0', 'cdp-bitmap-2', { busy: true }))]) {
    expect(() => planRound([disk('scsi0')], { nodes }, target)).toThrow(expect.objectContaining({ code: 'CONFLICT' }))
  }
})

test('names of a round fit into QEMU, and are no others of ours', () => {
  for (const name of Object.values(roundNamesOf('virtio15'))) {
    expect(name.length).toBeLessThanOrEqual(31)
    expect([keyOfRoundName(name), keyOfName(name)]).toEqual(['virtio15', undefined])
  }
})
