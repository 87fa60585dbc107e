import { describe, expect, test } from '@jest/globals'
import { next } from './vm-state.ts'
import type { VmEvent, VmState } from './vm-state.ts'

const states: VmState[] = [
  { is: 'detached', why: 'not looked for', sinceUnixMs: 1 },
  { is: 'attaching', why: 'a', sinceUnixMs: 1 },
  { is: 'syncing', kind: 'initial', why: 'b', doneBytes: 5, totalBytes: 9, sinceUnixMs: 1 },
  { is: 'streaming', why: 'c', sinceUnixMs: 1 },
  { is: 'tracking', why: 'd', sinceUnixMs: 1 },
]
const events: VmEvent[] = [
  { on: 'vmStarted' }, { on: 'vmStopped' }, { on: 'retry' }, { on: 'attachFailed', why: 'x', bitmapRecords: true }, { on: 'attachFailed', why: 'x', bitmapRecords: false },
  { on: 'syncBegan', kind: 'bitmap', why: 'x', totalBytes: 7 }, { on: 'syncAdvanced', doneBytes: 6, totalBytes: 9 }, { on: 'syncFailed', why: 'x' }, { on: 'inStep', why: 'x' },
  { on: 'captureLost', why: 'x' }, { on: 'stop', why: 'x' },
]
const capturing = ({ is }: VmState): boolean => is === 'attaching' || is === 'syncing' || is === 'streaming'
const effectsOf = (state: VmState, event: VmEvent): string[] => next(state, event, 2).effects.map((effect) => effect.do)

describe.each(states)('in the state $is', (state) => {
  test.each(events)('$on', (event) => {
    const { state: after, effects } = next(state, event, 2)
    expect(after.why).not.toBe('')
    if (after.is !== state.is) expect(after.sinceUnixMs).toBe(2)
    const does = effects.map((effect) => effect.do)
    // Nothing leaves capture without a clean-up, but by a failed attach (undone already) or the end of protection (which takes all away).
    if (capturing(state) && !capturing(after) && event.on !== 'attachFailed' && event.on !== 'stop') expect(does).toContain('cleanUp')
    // What is not protected is tried again, unless there is nothing to protect.
    if ((event.on === 'captureLost' || event.on === 'syncFailed' || event.on === 'attachFailed') && after !== state) expect(does).toContain('retryLater')
    if (after.is === 'attaching' && after !== state) expect(does).toContain('attach')
    if (event.on === 'vmStopped' || event.on === 'stop') {
      expect(after.is).toBe('detached')
      expect(does).toContain('forgetRetry')
    }
  })
})

describe('the life of a VM', () => {
  const walk = (...steps: VmEvent[]): { state: VmState; effects: string[] } => {
    let state = states[0]
    let effects: string[] = []
    for (const event of steps) {
      effects = effectsOf(state, event)
      state = next(state, event, 2).state
    }
    return { state, effects }
  }
  const up: VmEvent[] = [{ on: 'vmStarted' }, { on: 'syncBegan', kind: 'initial', why: 's', totalBytes: 9 }, { on: 'syncAdvanced', doneBytes: 3, totalBytes: 9 }, { on: 'inStep', why: 'initial sync complete' }]

  test('leads to streaming', () => {
    expect(walk(...up.slice(0, 3)).state).toMatchObject({ is: 'syncing', doneBytes: 3, totalBytes: 9, kind: 'initial', why: 's' })
    expect(walk(...up).state).toMatchObject({ is: 'streaming', why: 'initial sync complete' })
  })

  test('a VM that was stopped is attached to again when it starts, wherever the stop found it', () => {
    for (let steps = 1; steps <= up.length; steps++) {
      expect(walk(...up.slice(0, steps), { on: 'vmStopped' })).toMatchObject({ state: { is: 'detached', why: 'the VM does not run' }, effects: ['forgetRetry', 'cleanUp'] })
      expect(walk(...up.slice(0, steps), { on: 'vmStopped' }, { on: 'vmStarted' })).toMatchObject({ state: { is: 'attaching' }, effects: ['forgetRetry', 'attach'] })
    }
    expect(walk(...up, { on: 'captureLost', why: 'x' }, { on: 'vmStopped' }, { on: 'vmStarted' }).effects).toContain('attach')
  })

  test('the failure of an attach that the VM did not survive changes nothing', () => {
    expect(walk(up[0], { on: 'vmStopped' }, { on: 'attachFailed', why: 'no QMP', bitmapRecords: true })).toMatchObject({ state: { is: 'detached', why: 'the VM does not run' }, effects: [] })
  })

  test('another QEMU process is attached to at once, even in the middle of an attach', () => {
    for (let steps = 1; steps <= up.length; steps++) expect(walk(...up.slice(0, steps), { on: 'vmStarted' }).effects).toContain('attach')
  })

  test('lost capture is tracked, tried again with the reason, and comes into step', () => {
    expect(walk(...up, { on: 'captureLost', why: 'link down' })).toMatchObject({ state: { is: 'tracking', why: 'link down' }, effects: ['cleanUp', 'retryLater'] })
    expect(walk(...up, { on: 'captureLost', why: 'link down' }, { on: 'retry' })).toMatchObject({ state: { is: 'attaching', why: 'link down' }, effects: ['attach'] })
    expect(walk(...up, { on: 'captureLost', why: 'first' }, { on: 'captureLost', why: 'second' }).state.why).toBe('first')
  })

  test('a reason is kept over tries that fail: the sync tells why it is needed, not why it came late', () => {
    const away: VmEvent = { on: 'attachFailed', why: 'the agent cannot be reached', bitmapRecords: true }
    const lost: VmEvent[] = [...up, { on: 'captureLost', why: 'link down' }, { on: 'retry' }, away, { on: 'retry' }, away]
    expect(walk(...lost).state).toMatchObject({ is: 'tracking', why: 'the agent cannot be reached', because: 'link down' })
    expect(walk(...lost, { on: 'retry' }).state).toMatchObject({ is: 'attaching', why: 'link down' })
  })

  test('news of a sync that is over change nothing', () => {
    for (const late of [up[1], up[2], up[3]]) expect(walk(...up, { on: 'captureLost', why: 'x' }, late).state.is).toBe('tracking')
  })
})
