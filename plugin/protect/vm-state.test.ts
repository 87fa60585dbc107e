import { describe, expect, test } from '@jest/globals'
import { next } from './vm-state.ts'
import type { VmEvent, VmState } from './vm-state.ts'

const states: VmState[] = [
  { is: 'detached', why: 'not looked for', sinceUnixMs: 1 },
  { is: 'attaching', why: 'a', sinceUnixMs: 1 },
  { is: 'syncing', kind: 'initial', why: 'b', doneBytes: 5, totalBytes: 9, sinceUnixMs: 1 },
  { is: 'streaming', why: 'c', sinceUnixMs: 1 },
  { is: 'tracking', why: 'd', sinceUnixMs: 1 },
  { is: 'tracking', why: 'd', because: 'c', rounds: { count: 0 }, sinceUnixMs: 1 },
  { is: 'suspended', why: 'e', because: 'f', inStep: true, sinceUnixMs: 1 },
  { is: 'fenced', why: 'g', sinceUnixMs: 1 },
]
const events: VmEvent[] = [
  { on: 'vmStarted' }, { on: 'vmStopped' }, { on: 'retry' }, { on: 'attachFailed', why: 'x', bitmapRecords: true }, { on: 'attachFailed', why: 'x', bitmapRecords: false },
  { on: 'syncBegan', kind: 'bitmap', why: 'x', totalBytes: 7 }, { on: 'syncAdvanced', doneBytes: 6, totalBytes: 9 }, { on: 'syncFailed', why: 'x' }, { on: 'inStep', why: 'x' },
  { on: 'captureLost', why: 'x' }, { on: 'stop', why: 'x' }, { on: 'syncForced', why: 'x' }, { on: 'disksChanged', why: 'x' }, { on: 'suspend', why: 'x', running: true }, { on: 'suspend', why: 'x', running: false },
  { on: 'suspendFailed', why: 'x' }, { on: 'takeOutFailed' }, { on: 'resume' }, { on: 'vmStarted', held: 'x' }, { on: 'fenced', why: 'x' }, { on: 'removeFailed' }, { on: 'nothingMissed', why: 'x' },
  { on: 'roundsBegan', why: 'x' }, { on: 'roundDone', atUnixMs: 7 }, { on: 'roundsOver' }, { on: 'roundsFailed', why: 'x' },
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
    if (capturing(state) && !capturing(after) && event.on !== 'attachFailed' && event.on !== 'roundsBegan' && event.on !== 'stop') expect(does).toContain(after.is === 'suspended' ? 'takeOut' : after.is === 'fenced' ? 'remove' : 'cleanUp')
    // What is not protected is tried again, unless there is nothing to protect.
    if ((event.on === 'captureLost' || event.on === 'syncFailed' || event.on === 'attachFailed' || event.on === 'roundsFailed') && after !== state) expect(does).toContain('retryLater')
    if (after.is === 'attaching' && after !== state) expect(does).toContain('attach')
    // While somebody holds it, nothing attaches but his letting go, and another QEMU that he is not said to hold.
    if (state.is === 'suspended' && event.on !== 'resume' && event.on !== 'vmStarted') expect(does).not.toContain('attach')
    if (after.is === 'suspended' && after !== state) expect(does.includes('takeOut')).toBe(state.is !== 'suspended' || event.on === 'vmStarted' || (event.on === 'suspend' && event.running))
    // Fenced is fenced: nothing but the end of protection leads out of it, and what may be in QEMU is taken out.
    if (event.on === 'fenced' || (state.is === 'fenced' && event.on !== 'stop')) expect(after.is).toBe('fenced')
    if (state.is === 'fenced') for (const effect of does) expect(['forgetRetry', 'retryLater', 'remove']).toContain(effect)
    if (event.on === 'vmStopped' || event.on === 'stop') {
      expect(after.is).toBe(state.is === 'fenced' && event.on === 'vmStopped' ? 'fenced' : 'detached')
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

  test('leads to streaming at once where nothing can have been missed; from nowhere but an attach', () => {
    expect(walk({ on: 'vmStarted' }, { on: 'nothingMissed', why: 'n' }).state).toMatchObject({ is: 'streaming', why: 'n' })
    expect(walk(...up.slice(0, 2), { on: 'nothingMissed', why: 'n' }).state.is).toBe('syncing')
    expect(walk({ on: 'vmStarted' }, { on: 'captureLost', why: 'c' }, { on: 'nothingMissed', why: 'n' }).state.is).toBe('tracking')
  })

  test('a VM that was stopped is attached to again when it starts, wherever the stop found it', () => {
    for (let steps = 1; steps <= up.length; steps++) {
      expect(walk(...up.slice(0, steps), { on: 'vmStopped' })).toMatchObject({ state: { is: 'detached', why: 'the VM does not run' }, effects: ['forgetRetry', 'cleanUp'] })
      expect(walk(...up.slice(0, steps), { on: 'vmStopped' }, { on: 'vmStarted' })).toMatchObject({ state: { is: 'attaching' }, effects: ['forgetRetry', 'attach'] })
    }
    expect(walk(...up, { on: 'captureLost', why: 'x' }, { on: 'vmStopped' }, { on: 'vmStarted' }).effects).toContain('attach')
  })

  test('a forced sync of a VM in step compares everything; nothing else is disturbed by the wish', () => {
    const forced = walk(...up, { on: 'syncForced', why: 'forced by an operator' })
    expect(forced).toMatchObject({ state: { is: 'syncing', kind: 'delta', why: 'forced by an operator' }, effects: ['compareAll'] })
    for (let steps = 0; steps < up.length; steps++) expect(walk(...up.slice(0, steps), { on: 'syncForced', why: 'x' })).toEqual({ ...walk(...up.slice(0, steps)), effects: [] })
    expect(walk(...up, { on: 'syncForced', why: 'x' }, { on: 'inStep', why: 'delta sync complete' }).state).toMatchObject({ is: 'streaming' })
    expect(walk(...up, { on: 'syncForced', why: 'x' }, { on: 'syncFailed', why: 'EIO' })).toMatchObject({ state: { is: 'tracking', why: 'EIO' }, effects: ['cleanUp', 'retryLater'] })
    expect(walk(...up, { on: 'syncForced', why: 'x' }, { on: 'syncAdvanced', doneBytes: 5, totalBytes: 9, sentBytes: 1 }).state).toMatchObject({ doneBytes: 5, totalBytes: 9, sentBytes: 1 })
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

  test('rounds under a backup: counted, undisturbed by what would make others try again, and followed by the attach that the backup was in the way of', () => {
    const began: VmEvent[] = [...up, { on: 'captureLost', why: 'link down' }, { on: 'retry' }, { on: 'roundsBegan', why: 'a backup' }]
    const after = walk(...began, { on: 'retry' }, { on: 'captureLost', why: 'memory full' }, { on: 'roundDone', atUnixMs: 7 }, { on: 'roundDone', atUnixMs: 9 })
    expect(after).toMatchObject({ state: { is: 'tracking', why: 'a backup', because: 'link down', rounds: { count: 2, lastUnixMs: 9 } }, effects: [] })
    expect(walk(...began, { on: 'roundsOver' })).toMatchObject({ state: { is: 'attaching', why: 'link down' }, effects: ['attach'] })
    const failed = walk(...began, { on: 'roundsFailed', why: 'no quorum' })
    expect(failed).toMatchObject({ state: { is: 'tracking', why: 'no quorum', because: 'link down' }, effects: ['retryLater'] })
    expect(failed.state).not.toHaveProperty('rounds')
    expect(walk(...began, { on: 'vmStopped' }).effects).toContain('cleanUp')
    expect(walk(...began, { on: 'suspend', why: 'h', running: true })).toMatchObject({ state: { is: 'suspended', because: 'link down', inStep: false }, effects: ['forgetRetry', 'takeOut'] })
  })

  test('suspended: taken out in peace, the stream goes on if it was in step, and the reason of the sync is the first one', () => {
    const hold: VmEvent = { on: 'suspend', why: 'held by qm: resize', running: true }
    expect(walk(...up, hold)).toMatchObject({ state: { is: 'suspended', why: 'held by qm: resize', inStep: true }, effects: ['forgetRetry', 'takeOut'] })
    expect(walk(...up, hold, { ...hold, why: 'held by qm: resize; ann: move' })).toMatchObject({ state: { why: 'held by qm: resize; ann: move', because: 'suspended, held by qm: resize' }, effects: ['takeOut'] })
    const resumed = next(walk(...up, hold).state, { on: 'resume' }, 2)
    expect(resumed).toMatchObject({ state: { is: 'attaching' }, effects: [{ do: 'forgetRetry' }, { do: 'attach', why: 'suspended, held by qm: resize', sameStream: true }] })
    const lost = walk(...up, { on: 'captureLost', why: 'link down' }, hold).state
    expect(next(lost, { on: 'resume' }, 2).effects).toEqual([{ do: 'forgetRetry' }, { do: 'attach', why: 'link down', sameStream: false }])
    const middle = walk(...up.slice(0, 3), hold).state
    expect(next(middle, { on: 'resume' }, 2).effects).toEqual([{ do: 'forgetRetry' }, { do: 'attach', why: 's', sameStream: false }])
  })

  test('what could not be taken out under a hold is tried again, as long as it is held', () => {
    const met: VmEvent[] = [{ on: 'vmStarted', held: 'h' }, { on: 'takeOutFailed' }]
    expect(walk(...met)).toMatchObject({ state: { is: 'suspended', why: 'h' }, effects: ['retryLater'] })
    expect(walk(...met, { on: 'retry' })).toMatchObject({ state: { is: 'suspended', why: 'h' }, effects: ['takeOut'] })
    expect(walk(...met, { on: 'resume' }, { on: 'takeOutFailed' }).state.is).toBe('attaching')
    expect(walk(...up, { on: 'takeOutFailed' })).toMatchObject({ state: { is: 'streaming' }, effects: [] })
  })

  test('a hold over a VM that does not run waits for it; a VM that starts or stops under a hold is not attached to', () => {
    expect(walk(...up, { on: 'vmStopped' }, { on: 'suspend', why: 'h', running: false }).state.is).toBe('detached')
    expect(walk(...up, { on: 'vmStopped' }, { on: 'vmStarted', held: 'h' })).toMatchObject({ state: { is: 'suspended', because: 'the VM runs', inStep: false }, effects: ['forgetRetry', 'takeOut'] })
    expect(walk(...up, { on: 'suspend', why: 'h', running: true }, { on: 'vmStopped' }, { on: 'resume' }).state.is).toBe('detached')
    expect(walk(...up, { on: 'suspend', why: 'h', running: true }, { on: 'suspendFailed', why: 'QMP' })).toMatchObject({ state: { is: 'tracking', because: 'suspended, h' }, effects: ['cleanUp', 'retryLater'] })
  })

  test('fenced: all of capture is taken out, again as long as that fails and with each QEMU that is met; nothing attaches any more', () => {
    const fenced: VmEvent[] = [...up, { on: 'fenced', why: 'taken over' }]
    expect(walk(...fenced)).toMatchObject({ state: { is: 'fenced', why: 'taken over' }, effects: ['forgetRetry', 'remove'] })
    expect(walk(...fenced, { on: 'removeFailed' }).effects).toEqual(['retryLater'])
    expect(walk(...fenced, { on: 'removeFailed' }, { on: 'retry' }).effects).toEqual(['remove'])
    expect(walk(...fenced, { on: 'vmStopped' }, { on: 'vmStarted' })).toMatchObject({ state: { is: 'fenced' }, effects: ['forgetRetry', 'remove'] })
    expect(walk(...fenced, { on: 'suspend', why: 'h', running: true }, { on: 'resume' }, { on: 'captureLost', why: 'x' }).state).toEqual({ is: 'fenced', why: 'taken over', sinceUnixMs: 2 })
    expect(walk(...fenced, { on: 'stop', why: 'deleted' }).state).toMatchObject({ is: 'detached', why: 'deleted' })
  })

  test('news of a sync that is over change nothing', () => {
    for (const late of [up[1], up[2], up[3]]) expect(walk(...up, { on: 'captureLost', why: 'x' }, late).state.is).toBe('tracking')
  })
})
