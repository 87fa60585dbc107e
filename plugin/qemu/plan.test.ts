import { describe, expect, test } from '@jest/globals'
import { planAttach } from './attach-plan.ts'
import type { AttachStep } from './attach-plan.ts'
import { planRotation } from './bitmaps.ts'
import type { BlockBitmap, BlockNode, BlockState } from './block-state.ts'
import { planCarry, planTakeOver, readCarried } from './carried-bitmaps.ts'
import type { QemuDisk } from './disks.ts'

const disk = (key: string, shape: '8.4' | '9.x'): QemuDisk => ({
  key, shape, qdev: key, qomPath: `/machine/peripheral/${key}`, sizeBytes: 2 ** 30, iothread: undefined, ...(shape === '8.4'
    ? { rootNode: `#block-${key}`, formatNode: `#block-${key}`, throttleNode: undefined, bitmapNode: `#block-${key}`, readNode: `#block-${key}` }
    : { rootNode: `drive-${key}`, formatNode: `f-${key}`, throttleNode: `drive-${key}`, bitmapNode: `drive-${key}`, readNode: `f-${key}` }),
})
const bitmap = (node: string, name: string, more: Partial<BlockBitmap> = {}): BlockBitmap =>
  ({ name, node, recording: true, busy: false, granularityBytes: 65536, dirtyBytes: 0, ...more })
const empty: BlockState = { devices: [], nodes: [], jobs: [], exports: [] }
const target = { nbdSocketPath: '/run/t', exportNameOf: (key: string) => `vm-${key}` }
const named = (steps: readonly AttachStep[]): string[] => steps.map((step) => `${step.is === 'command' ? step.command : step.is} ${step.key}`.trim())

describe('planAttach', () => {
  test('9.x: bitmaps of all disks in one transaction, targets, mirrors, then READY of all', () => {
    const { steps, bitmaps } = planAttach([disk('scsi0', '9.x'), disk('scsi1', '9.x')], empty, target)
    expect(named(steps)).toEqual(['transaction', 'blockdev-add scsi0', 'blockdev-add scsi1', 'blockdev-mirror scsi0', 'blockdev-mirror scsi1', 'wait-ready scsi0', 'wait-ready scsi1'])
    expect([...bitmaps]).toEqual([['scsi0', 'cdp-bitmap-1'], ['scsi1', 'cdp-bitmap-1']])
    expect(steps[0]).toMatchObject({ args: { actions: [{ type: 'block-dirty-bitmap-add', data: { node: 'drive-scsi0', name: 'cdp-bitmap-1', persistent: false } }, { data: { node: 'drive-scsi1' } }] } })
    expect(steps[1]).toMatchObject({ args: { driver: 'nbd', 'node-name': 'cdp-target-scsi0', server: { type: 'unix', path: '/run/t' }, export: 'vm-scsi0', 'reconnect-delay': 0 } })
    expect(steps[3]).toMatchObject({ args: {
      'job-id': 'cdp-job-scsi0', device: 'drive-scsi0', target: 'cdp-target-scsi0', sync: 'none', 'copy-mode': 'write-blocking', 'on-target-error': 'stop', granularity: 4096,
      'filter-node-name': 'cdp-filter-scsi0' } })
  })

  test('8.4: the shield follows READY: pause, standby, add, re-point, resume', () => {
    const { steps } = planAttach([disk('scsi0', '8.4')], empty, target)
    expect(named(steps).slice(4)).toEqual(['job-pause scsi0', 'wait-standby scsi0', 'blockdev-add scsi0', 'qom-set scsi0', 'job-resume scsi0'])
    expect(steps[6]).toMatchObject({ args: { driver: 'raw', 'node-name': 'cdp-shield-scsi0', file: 'cdp-filter-scsi0' } })
    expect(steps[7]).toMatchObject({ args: { path: '/machine/peripheral/scsi0', property: 'drive', value: 'cdp-shield-scsi0' } })
  })

  test('a bitmap of ours that records is used on; one that stands still is not', () => {
    const nodes = [{ name: 'drive-scsi0', driver: 'throttle', bitmaps: [bitmap('drive-scsi0', 'cdp-bitmap-4'), bitmap('drive-scsi0', 'backup-bitmap')] }]
    const kept = planAttach([disk('scsi0', '9.x')], { ...empty, nodes }, target)
    expect(named(kept.steps)[0]).toBe('blockdev-add scsi0')
    expect(kept.bitmaps.get('scsi0')).toBe('cdp-bitmap-4')
    const still = [{ name: 'drive-scsi0', driver: 'throttle', bitmaps: [bitmap('drive-scsi0', 'cdp-bitmap-4', { recording: false })] }]
    expect(planAttach([disk('scsi0', '9.x')], { ...empty, nodes: still }, target).bitmaps.get('scsi0')).toBe('cdp-bitmap-5')
  })

  test('what is attached, or held by a job of somebody else, is refused', () => {
    const attached = { ...empty, nodes: [{ name: 'cdp-target-scsi0', driver: 'nbd', bitmaps: [] }] }
    expect(() => planAttach([disk('scsi0', '9.x')], attached, target)).toThrow(expect.objectContaining({ code: 'CONFLICT', retry: false }))
    expect(planAttach([disk('scsi1', '9.x')], attached, target).steps.length).toBeGreaterThan(0)
    const held = { ...empty, jobs: [{ id: 'drive-scsi0', type: 'backup', status: 'running', ready: false, paused: false, failed: false }] }
    expect(() => planAttach([disk('scsi0', '8.4')], held, target)).toThrow(expect.objectContaining({ code: 'CONFLICT', retry: true }))
    // On 9.x a backup works below the node our job is on; a disk move does not, under either of its names.
    const nodes = [{ name: 'drive-scsi0', driver: 'throttle', bitmaps: [] }]
    expect(planAttach([disk('scsi0', '9.x')], { ...held, nodes }, target).steps.length).toBeGreaterThan(0)
    for (const id of ['drive-scsi0', 'mirror-scsi0']) {
      const moving = { ...empty, nodes, jobs: [{ id, type: 'mirror', status: 'running', ready: false, paused: false, failed: false }] }
      expect(() => planAttach([disk('scsi0', '9.x')], moving, target)).toThrow(expect.objectContaining({ code: 'CONFLICT', retry: true }))
    }
  })

  test('a disk above 1 TiB gets the coarser granularity', () => {
    const { steps } = planAttach([{ ...disk('scsi0', '9.x'), sizeBytes: 2 ** 40 + 512 }], empty, target)
    expect(steps.find((step) => step.is === 'command' && step.command === 'blockdev-mirror')).toMatchObject({ args: { granularity: 65536 } })
  })
})

describe('planRotation', () => {
  const nodes = (...bitmaps: BlockBitmap[]) => [{ name: 'drive-scsi0', driver: 'throttle', bitmaps }]
  const plan = (...bitmaps: BlockBitmap[]) => planRotation(disk('scsi0', '9.x'), nodes(...bitmaps))

  test('the first rotation adds the next bitmap before it stops the present one', () => {
    const { actions, result } = plan(bitmap('drive-scsi0', 'cdp-bitmap-1'))
    expect(actions.map(({ type, data }) => `${type} ${String(data['name'])}`)).toEqual(['block-dirty-bitmap-add cdp-bitmap-2', 'block-dirty-bitmap-disable cdp-bitmap-1'])
    expect(result).toEqual({ key: 'scsi0', current: 'cdp-bitmap-2', rotated: 'cdp-bitmap-1' })
  })

  test('several that stand still become one, and bitmaps of others are not touched', () => {
    const { actions, result } = plan(bitmap('drive-scsi0', 'cdp-bitmap-10'), bitmap('drive-scsi0', 'theirs'), bitmap('drive-scsi0', 'cdp-bitmap-9', { recording: false }))
    expect(actions.map(({ type, data }) => `${type} ${String(data['name'] ?? data['target'])}`)).toEqual([
      'block-dirty-bitmap-add cdp-bitmap-11', 'block-dirty-bitmap-disable cdp-bitmap-10', 'block-dirty-bitmap-merge cdp-bitmap-9', 'block-dirty-bitmap-remove cdp-bitmap-10'])
    expect(result).toEqual({ key: 'scsi0', current: 'cdp-bitmap-11', rotated: 'cdp-bitmap-9' })
  })

  test('without a bitmap one begins to record and nothing is rotated; a bitmap in use is a conflict', () => {
    expect(plan().result).toEqual({ key: 'scsi0', current: 'cdp-bitmap-1', rotated: undefined })
    expect(() => plan(bitmap('drive-scsi0', 'cdp-bitmap-1', { busy: true, recording: false }))).toThrow(expect.objectContaining({ code: 'CONFLICT', retry: true }))
  })
})

describe('bitmaps that a live migration takes along', () => {
  const carried = { coveredBytes: { scsi0: 2 ** 30, scsi1: 512 }, agent: { id: '0123456789abcdef', durableSeq: 2 ** 45 } }
  const disks = [disk('scsi0', '9.x'), disk('scsi1', '9.x')]
  const nodes = (...bitmaps: readonly BlockBitmap[]): BlockNode[] => ['drive-scsi0', 'drive-scsi1'].map((name) => ({ name, driver: 'throttle', bitmaps: bitmaps.filter(({ node }) => node === name) }))
  const ours = nodes(bitmap('drive-scsi0', 'cdp-bitmap-2'), bitmap('drive-scsi0', 'cdp-bitmap-1', { recording: false }), bitmap('drive-scsi1', 'cdp-bitmap-7'))
  const made = (actions: ReturnType<typeof planCarry>): BlockBitmap[] => actions.filter(({ type }) => type === 'block-dirty-bitmap-add').map(({ data }) => bitmap(String(data['node']), String(data['name'])))

  test('say on the other node what they said here', () => {
    const there = made(planCarry(disks, carried, ours))
    expect(there.every(({ name }) => name.length < 1024)).toBe(true)
    expect(readCarried(disks, nodes(...there))).toEqual(carried)
    expect(readCarried(disks, ours)).toBeUndefined()
    expect(planCarry(disks, carried, nodes(bitmap('drive-scsi0', 'cdp-bitmap-2', { recording: false }), ...there))).toEqual([])
    expect(planTakeOver(disks, nodes(...there)).map(({ type, data }) => `${type} ${String(data['name'] ?? data['target'])}`)).toEqual(there.flatMap(({ name }) => [
      'block-dirty-bitmap-add cdp-bitmap-1', 'block-dirty-bitmap-merge cdp-bitmap-1', `block-dirty-bitmap-remove ${name}`]))
  })

  test('count for the disks whose bitmap records, and for none if they do not agree', () => {
    const [one, other] = made(planCarry(disks, carried, ours))
    expect(readCarried(disks, nodes(one, { ...other, recording: false }))).toEqual({ ...carried, coveredBytes: { scsi0: 2 ** 30 } })
    const [, later] = made(planCarry(disks, { ...carried, agent: { ...carried.agent, durableSeq: 1 } }, ours))
    expect(readCarried(disks, nodes(one, later))?.coveredBytes).toEqual({})
    expect(readCarried(disks, nodes({ ...one, name: 'cdp-carried-512' }))).toBeUndefined()
  })
})
