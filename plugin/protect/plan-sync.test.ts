import { describe, expect, test } from '@jest/globals'
import type { Welcome } from '../../core/stream/index.ts'
import { planSync } from './attach-procedure.ts'
import type { VmMemory } from './vm-memory.ts'

const memory = (bitmaps: VmMemory['bitmaps'], progress?: VmMemory['progress']): VmMemory => ({ format: 1, instance: '1@1', bitmaps, ...(progress === undefined ? {} : { progress }) })
const welcome = (baseComplete: boolean, more: Partial<Welcome> = {}): Welcome => ({ epoch: 1, generation: 1, durableSeq: 5, baseComplete, syncProgress: { 0: 4096 }, disks: [], ...more })
const initial = { kind: 'initial', fromBitmaps: false, wholeAbove: true, byHash: false }
const delta = { kind: 'delta', fromBitmaps: false, wholeAbove: true, byHash: true }

describe('planSync', () => {
  test.each<[string, boolean, VmMemory | undefined, boolean, object]>([
    ['nothing known, no base', false, undefined, true, initial],
    ['half an attach, no base', false, memory('attaching'), true, initial],
    ['a copy of this process, bitmaps gone', false, memory('copying'), false, initial],
    ['a copy of this process, bitmaps there', false, memory('copying'), true, { ...initial, fromBitmaps: true }],
    ['covered, but the agent lost its base', false, memory('covered'), true, initial],
    ['covered, bitmaps there', true, memory('covered'), true, { kind: 'bitmap', fromBitmaps: true, wholeAbove: false, byHash: false }],
    ['covered, bitmaps gone', true, memory('covered'), false, delta],
    ['a copy that did not end', true, memory('copying'), true, delta],
    ['another QEMU process', true, undefined, true, delta],
    ['half an attach', true, memory('attaching'), true, delta],
    ['progress of a comparison, but the bitmaps are gone', true, memory('copying', { 0: 8192 }), false, delta],
  ])('%s', (_what, base, known, bitmaps, expected) => {
    const plan = planSync(welcome(base, { hashes: true }), known, bitmaps, 'link down')
    expect(plan).toMatchObject(expected)
    expect(plan.why).not.toBe('')
    // Only a copy that goes on may leave out what is below its progress.
    expect([plan.fromBytes(0), plan.fromBytes(1)]).toEqual(plan.kind === 'initial' && plan.fromBitmaps ? [4096, 0] : [0, 0])
    // An agent that cannot compare gets everything.
    expect(planSync(welcome(base), known, bitmaps, 'link down')).toMatchObject({ ...expected, byHash: false, ...('byHash' in expected && expected.byHash === true ? { kind: 'full' } : {}) })
  })

  test('a comparison that was cut off goes on where it was durably, with the bitmap for what lies below; not if the agent lost something', () => {
    const known = memory('copying', { 0: 1 << 20 })
    const plan = planSync(welcome(true, { hashes: true }), known, true, 'link down')
    expect(plan).toMatchObject({ kind: 'delta', fromBitmaps: true, wholeAbove: true, byHash: true, why: 'comparison goes on: link down' })
    expect([plan.fromBytes(0), plan.fromBytes(1)]).toEqual([1 << 20, 0])
    const lost = planSync({ ...welcome(true, { hashes: true }), agentLostData: true }, known, true, 'link down')
    expect(lost).toMatchObject({ ...delta, why: 'the recovery site lost data that it had acknowledged' })
    expect(lost.fromBytes(0)).toBe(0)
    // What is left of a bitmap that speaks of everything is worth more than a comparison.
    expect(planSync(welcome(true, { hashes: true }), memory('covered', { 0: 1 }), true, 'x').kind).toBe('bitmap')
    // An older agent cannot go on with it.
    expect(planSync(welcome(true), known, true, 'x')).toMatchObject({ kind: 'full', fromBitmaps: false })
  })

  test('a first copy compares where a mirror has data, from its beginning or its progress', () => {
    const seeded = welcome(false, { hashes: true, mirrorHasData: true })
    expect(planSync(seeded, undefined, true, 'x')).toMatchObject({ ...initial, byHash: true, why: 'first copy, compared with what is there' })
    const goesOn = planSync(seeded, memory('copying'), true, 'x')
    expect(goesOn).toMatchObject({ ...initial, fromBitmaps: true, byHash: true })
    expect(goesOn.fromBytes(0)).toBe(4096)
  })
})
