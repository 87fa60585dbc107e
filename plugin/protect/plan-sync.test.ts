import { describe, expect, test } from '@jest/globals'
import type { Welcome } from '../../core/stream/index.ts'
import { planSync, toDiskEntries } from './attach-procedure.ts'
import type { VmMemory } from './vm-memory.ts'

const memory = (bitmaps: VmMemory['bitmaps']): VmMemory => ({ format: 1, instance: '1@1', bitmaps })
const welcome = (baseComplete: boolean, syncProgress: Record<string, number> = { 0: 4096 }): Welcome => ({ epoch: 1, durableSeq: 5, baseComplete, syncProgress, disks: [] })

describe('planSync', () => {
  test.each<[string, boolean, VmMemory | undefined, boolean, object]>([
    ['nothing known, no base', false, undefined, true, { kind: 'initial', fromBitmaps: false, wholeAbove: true }],
    ['half an attach, no base', false, memory('attaching'), true, { kind: 'initial', fromBitmaps: false, wholeAbove: true }],
    ['a copy of this process, bitmaps gone', false, memory('copying'), false, { kind: 'initial', fromBitmaps: false, wholeAbove: true }],
    ['a copy of this process, bitmaps there', false, memory('copying'), true, { kind: 'initial', fromBitmaps: true, wholeAbove: true }],
    ['covered, but the agent lost its base', false, memory('covered'), true, { kind: 'initial', fromBitmaps: false, wholeAbove: true }],
    ['covered, bitmaps there', true, memory('covered'), true, { kind: 'bitmap', fromBitmaps: true, wholeAbove: false }],
    ['covered, bitmaps gone', true, memory('covered'), false, { kind: 'full', fromBitmaps: false, wholeAbove: true }],
    ['a full copy that did not end', true, memory('copying'), true, { kind: 'full', fromBitmaps: false, wholeAbove: true }],
    ['another QEMU process', true, undefined, true, { kind: 'full', fromBitmaps: false, wholeAbove: true }],
    ['half an attach', true, memory('attaching'), true, { kind: 'full', fromBitmaps: false, wholeAbove: true }],
  ])('%s', (_what, base, known, bitmaps, expected) => {
    const plan = planSync(welcome(base), known, bitmaps, 'link down')
    expect(plan).toMatchObject(expected)
    expect(plan.why).not.toBe('')
    // Only a copy that goes on may leave out what is below its progress.
    expect([plan.fromBytes(0), plan.fromBytes(1)]).toEqual(plan.kind === 'initial' && plan.fromBitmaps ? [4096, 0] : [0, 0])
  })
})

test('disks are numbered by key, scsi2 before scsi10, whatever order QEMU tells them in', () => {
  const disk = (key: string) => ({ key, sizeBytes: 512 }) as Parameters<typeof toDiskEntries>[0][number]
  expect(toDiskEntries([disk('virtio0'), disk('scsi10'), disk('scsi2')]).map(({ disk: number, key }) => [number, key])).toEqual([[0, 'scsi2'], [1, 'scsi10'], [2, 'virtio0']])
})
