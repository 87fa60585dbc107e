import { describe, expect, test } from '@jest/globals'
import { beginTwoPhaseCut, nextTwoPhaseCut } from './two-phase-cut.ts'
import type { TwoPhaseEvent, TwoPhaseStep } from './two-phase-cut.ts'

const play = (...events: TwoPhaseEvent[]): TwoPhaseStep => events.reduce((step, event) => nextTwoPhaseCut(step.state, event), beginTwoPhaseCut(['a', 'b'], [101, 102, 103]))
const aHolds = { on: 'held', node: 'a', vmIds: [101, 102] } as const
const bHolds = { on: 'held', node: 'b', vmIds: [103] } as const
const outcomeOf = ({ state }: TwoPhaseStep) => (state.is === 'ended' ? state.outcome : undefined)
const asked = ({ effects }: TwoPhaseStep): string[] => effects.map((effect) => `${effect.do} ${effect.node}`)

describe('a cut over two nodes', () => {
  test('holds everywhere first', () => expect(asked(play())).toEqual(['hold a', 'hold b']))

  test('commits nowhere before all members are held', () => {
    expect(asked(play(aHolds))).toEqual([])
    expect(asked(play(aHolds, aHolds))).toEqual([])
    expect(asked(play(aHolds, bHolds))).toEqual(['commit a', 'commit b'])
  })

  test('succeeds when every node has inserted its markers', () => {
    expect(outcomeOf(play(aHolds, bHolds, { on: 'committed', node: 'b' }))).toBeUndefined()
    expect(outcomeOf(play(aHolds, bHolds, { on: 'committed', node: 'b' }, { on: 'committed', node: 'a' }))).toEqual({ ok: true })
  })

  test('a refused hold releases everywhere and names the node', () => {
    const step = play(aHolds, { on: 'refused', node: 'b', why: 'VM 103 is syncing' })
    expect(asked(step)).toEqual(['release a', 'release b'])
    expect(outcomeOf(step)).toEqual({ ok: false, why: 'b: VM 103 is syncing', retry: false })
  })

  test('a late hold releases everywhere, names who was waited for, and may be tried again', () => {
    const step = play(bHolds, { on: 'late' })
    expect(asked(step)).toEqual(['release a', 'release b'])
    expect(outcomeOf(step)).toEqual({ ok: false, why: 'the hold ran out while waiting for a', retry: true })
  })

  test('a hold granted after the end is released again', () => expect(asked(play(bHolds, { on: 'late' }, aHolds))).toEqual(['release a']))

  test('a member that no node holds, or two nodes hold, is no cut', () => {
    expect(outcomeOf(play({ on: 'held', node: 'a', vmIds: [101] }, bHolds))).toEqual({ ok: false, why: 'VM 102 is held by no node', retry: false })
    expect(outcomeOf(play(aHolds, { on: 'held', node: 'b', vmIds: [103, 102] }))).toEqual({ ok: false, why: 'a VM is held by two nodes', retry: false })
  })

  test('a commit that comes after the hold lapsed makes the cut abandoned, whatever the others did', () => {
    const step = play(aHolds, bHolds, { on: 'committed', node: 'a' }, { on: 'refused', node: 'b', why: 'the hold ran out' })
    expect(outcomeOf(step)).toEqual({ ok: false, why: 'b: the hold ran out', retry: true })
  })

  test('a node that dies between hold and commit makes the cut abandoned', () => {
    const step = play(aHolds, bHolds, { on: 'committed', node: 'a' }, { on: 'late' })
    expect(outcomeOf(step)).toEqual({ ok: false, why: 'no answer to the commit from b', retry: false })
    expect(asked(step)).toEqual(['release b'])
  })

  test('what comes twice, or for another phase, changes nothing', () => {
    expect(outcomeOf(play({ on: 'committed', node: 'a' }, aHolds, bHolds, aHolds, { on: 'committed', node: 'b' }, { on: 'committed', node: 'b' }))).toBeUndefined()
    const done = play(aHolds, bHolds, { on: 'committed', node: 'a' }, { on: 'committed', node: 'b' })
    expect(nextTwoPhaseCut(done.state, { on: 'late' })).toEqual({ state: done.state, effects: [] })
    expect(outcomeOf(play({ on: 'held', node: 'stranger', vmIds: [101, 102] }, bHolds))).toBeUndefined()
  })
})
