import { describe, expect, test } from '@jest/globals'
import { DAY_MS, HOUR_MS, planRetention, policyFrom, reserveOf } from './index.ts'
import type { PlanFacts, VmFacts } from './index.ts'
import { isAtOrBefore, lived, LONGEST_GAP_MS, movedTo, newHistoryClock, sampleEveryMs, spanMs } from './history-clock.ts'
import type { Candidate, HistoryClock } from './history-clock.ts'

const MIB = 2 ** 20
const policy = (own = {}) => policyFrom({ historyMs: 24 * HOUR_MS, thinning: [], promotionBytesPerSec: 1e9 }, own)

/** A checkpoint each 10 min over both VMs; number n is at 10 n and 20 n. */
const checkpoint = (n: number): Candidate => ({ id: `c${n}`, atUnixMs: n * 600_000, seqs: { 101: 10 * n, 102: 20 * n } })
const history = (from: number, to: number): Candidate[] => Array.from({ length: to - from + 1 }, (_, at) => checkpoint(from + at))

const finder = (candidates: readonly Candidate[]): PlanFacts['find'] => ({
  newestAtOrBelow: (limits) => candidates.findLast(({ seqs }) => Object.entries(seqs).every(([vm, seq]) => seq <= (limits.get(vm) ?? Infinity))),
  oldestAtOrAbove: (vm, seq) => candidates.find(({ seqs }) => seqs[vm] >= seq),
})

/** The clock as it is after these checkpoints came in their time. */
const clockAfter = (candidates: readonly Candidate[], historyMs = 24 * HOUR_MS): HistoryClock => {
  let clock = newHistoryClock()
  candidates.forEach((candidate, at) => (clock = lived(clock, at === 0 ? 0 : 600_000, candidate, sampleEveryMs(historyMs))))
  return clock
}

const vmFacts = (vm: string, own: Partial<VmFacts> = {}): VmFacts => ({
  vm, baseSeq: 0, journalBytes: 100 * MIB, pins: [], damagedSeq: undefined,
  // A record is a MiB.
  seqThatFrees: (bytes) => Math.ceil(bytes / MIB),
  ...own,
})
const pin = (vm: string, seq: number) => ({ vmDirectory: `/vms/${vm}`, seq, reason: 'recovery point p1', sinceUnixMs: 1 })

const facts = (candidates: readonly Candidate[], own: Partial<PlanFacts> = {}): PlanFacts => ({
  policy: policy(), clock: clockAfter(candidates), isFilling: false, vms: [vmFacts('101'), vmFacts('102')], reserveShareBytes: 0, find: finder(candidates), ...own,
})
const ids = (alarms: readonly { id: string; level: string }[]): string[] => alarms.map(({ id, level }) => `${level} ${id}`)

describe('time', () => {
  test('the base moves to the newest checkpoint that is as old as history is long, and no further', () => {
    expect(planRetention(facts(history(1, 145))).target).toMatchObject({ id: 'c1', why: 'time' })
    expect(planRetention(facts(history(1, 144))).target).toBeUndefined()
    expect(planRetention(facts(history(1, 200))).target).toMatchObject({ id: 'c56' })
  })

  test('a base that is there already does not move', () => {
    const candidates = history(56, 200)
    const vms = [vmFacts('101', { baseSeq: 560 }), vmFacts('102', { baseSeq: 1120 })]
    expect(planRetention(facts(candidates, { clock: clockAfter(history(1, 200)), vms })).target).toBeUndefined()
  })

  test.each([
    ['a year forward', 365 * DAY_MS],
    ['a year back', -365 * DAY_MS],
  ])('labels that jump %s change nothing', (_, jumpMs) => {
    const candidates = history(1, 200).map((candidate, at) => (at < 150 ? candidate : { ...candidate, atUnixMs: candidate.atUnixMs + jumpMs }))
    expect(planRetention(facts(candidates)).target).toMatchObject({ id: 'c56' })
  })

  test('while the source is silent nothing gets older, and a silence counts an hour at most', () => {
    const before = clockAfter(history(1, 100))
    const after = lived(before, 30 * DAY_MS, checkpoint(101), sampleEveryMs(DAY_MS))
    expect(spanMs(after) - spanMs(before)).toBe(LONGEST_GAP_MS)
    expect(lived(before, -5, checkpoint(101), 1).livedMs).toBe(before.livedMs)
  })

  test('samples before the base are forgotten, but for the one that tells its age', () => {
    const clock = movedTo(clockAfter(history(1, 200)), checkpoint(56))
    expect(clock.samples[0].id).toBe('c56')
    expect(spanMs(clock)).toBe(24 * HOUR_MS)
    expect(movedTo(clock, checkpoint(3))).toEqual(clock)
  })

  test('order is by sequence: what was cut later comes later, whatever its label', () => {
    expect(isAtOrBefore({ ...checkpoint(3), atUnixMs: 1e15 }, checkpoint(4))).toBe(true)
    expect(isAtOrBefore({ ...checkpoint(4), atUnixMs: 0 }, checkpoint(3))).toBe(false)
    expect(isAtOrBefore({ ...checkpoint(3), seqs: { 7: 1 } }, checkpoint(4))).toBe(false)
  })
})

describe('size', () => {
  const limited = policy({ journalLimitBytes: 200 * MIB })

  test('near its limit the journal of one VM moves the whole group, to the earliest checkpoint that frees enough', () => {
    const vms = [vmFacts('101'), vmFacts('102', { journalBytes: 191 * MIB })]
    // 191 - 180 MiB are to go: record 11 of VM 102, and the first checkpoint behind it.
    expect(planRetention(facts(history(1, 20), { policy: limited, vms })).target).toMatchObject({ id: 'c1', why: 'size' })
    expect(planRetention(facts(history(1, 20), { policy: limited, vms: [vmFacts('101'), vmFacts('102', { journalBytes: 300 * MIB })] })).target).toMatchObject({ id: 'c6' })
    expect(planRetention(facts(history(1, 20), { policy: limited })).target).toBeUndefined()
  })

  test('where no checkpoint is late enough, the newest one has to do', () => {
    expect(planRetention(facts(history(1, 3), { policy: limited, vms: [vmFacts('101', { journalBytes: 900 * MIB }), vmFacts('102')] })).target).toMatchObject({ id: 'c3' })
  })

  test('without any checkpoint the limit is passed, and that is said', () => {
    const plan = planRetention(facts([], { policy: limited, vms: [vmFacts('101', { journalBytes: 250 * MIB })] }))
    expect([plan.target, plan.heldBy, ids(plan.alarms)]).toEqual([undefined, 'no-checkpoint', ['error retention.over-limit', 'error retention.history-short']])
    expect(plan.alarms[0].message).toContain('no checkpoint')
  })

  test.each([
    [140, []],
    [160, ['warn retention.journal-large']],
    [201, ['error retention.over-limit']],
    [300, ['error retention.hard-stop']],
  ])('%d MiB of 200: %s', (mib, expected) => {
    const { alarms } = planRetention(facts(history(1, 2), { policy: limited, isFilling: true, vms: [vmFacts('101', { journalBytes: mib * MIB })] }))
    expect(ids(alarms)).toEqual(expected)
  })
})

describe('what holds', () => {
  test('a pin: the base goes as far as it allows, the rest waits with an alarm that names it', () => {
    const vms = [vmFacts('101', { pins: [pin('101', 305)] }), vmFacts('102')]
    const plan = planRetention(facts(history(1, 200), { vms }))
    expect(plan).toMatchObject({ target: { id: 'c30' }, heldBy: 'pin' })
    expect(plan.alarms).toMatchObject([{ id: 'retention.pinned', message: expect.stringContaining('recovery point p1') }])
    const atTheBase = [vmFacts('101', { pins: [pin('101', 300)], baseSeq: 300 }), vmFacts('102', { baseSeq: 600 })]
    expect(planRetention(facts(history(30, 200), { clock: clockAfter(history(1, 200)), vms: atTheBase }))).toMatchObject({ target: undefined, heldBy: 'pin' })
  })

  test('a pin above where the base should be holds nothing', () => {
    expect(planRetention(facts(history(1, 200), { vms: [vmFacts('101', { pins: [pin('101', 560)] }), vmFacts('102')] }))).toMatchObject({ target: { id: 'c56' }, heldBy: undefined, alarms: [] })
  })

  test('damage: the base stops before it, for the whole group', () => {
    const plan = planRetention(facts(history(1, 200), { vms: [vmFacts('101'), vmFacts('102', { damagedSeq: 401 })] }))
    expect(plan).toMatchObject({ target: { id: 'c20' }, heldBy: 'damage' })
    expect(ids(plan.alarms)).toEqual(['error retention.damaged'])
  })

  test('when a journal is over its limit, the alarm says what holds it', () => {
    const vms = [vmFacts('101', { journalBytes: 250 * MIB, pins: [pin('101', 5)] })]
    const { alarms } = planRetention(facts(history(1, 100), { policy: policy({ journalLimitBytes: 200 * MIB }), vms, isFilling: true }))
    expect(alarms.find(({ id }) => id === 'retention.over-limit')?.message).toContain('a pin holds it')
  })
})

describe('length', () => {
  const short = (part: number, isFilling: boolean): string[] => {
    const clock: HistoryClock = { livedMs: part * DAY_MS, samples: [{ ...checkpoint(1), livedMs: 0 }] }
    return ids(planRetention(facts(history(1, 2), { clock, isFilling })).alarms)
  }
  test.each([[0.86, []], [0.84, ['warn retention.history-short']], [0.74, ['error retention.history-short']]])('%d of the configured time: %s; nothing while it first fills', (part, expected) => {
    expect(short(part, false)).toEqual(expected)
    expect(short(part, true)).toEqual([])
  })
})

describe('reserve', () => {
  test('a group frees its share, but never the last part of its history', () => {
    const vms = [vmFacts('101'), vmFacts('102')]
    const some = planRetention(facts(history(1, 100), { vms, reserveShareBytes: 60 * MIB }))
    expect(some).toMatchObject({ target: { id: 'c3', why: 'reserve' } })
    expect(ids(some.alarms)).toContain('warn retention.reserve')
    const all = planRetention(facts(history(1, 100), { vms, reserveShareBytes: 1e12 }))
    expect(all.target?.id).toBe('c92')
  })
  test('is the smaller of 30 GB and 15 %, or what was asked for', () => {
    expect([reserveOf(1e12, {}), reserveOf(1e11, {}), reserveOf(1e11, { reserveBytes: 7 }), reserveOf(1e11, { reservePercent: 5 })]).toEqual([30e9, 15e9, 7, 5e9])
  })
})

test('a policy that contradicts itself is refused with what to do', () => {
  for (const own of [
    { historyMs: HOUR_MS - 1 }, { historyMs: 31 * DAY_MS }, { journalLimitBytes: 10, hardStopBytes: 9 }, { journalLimitBytes: 10, warnBytes: 11 },
    { thinning: [{ afterMs: 1, everyMs: 60_000 }, { afterMs: 2, everyMs: 90_000 }] }, { thinning: [{ afterMs: 5, everyMs: 60_000 }, { afterMs: 2, everyMs: 120_000 }] },
  ]) expect(() => policy(own)).toThrow(expect.objectContaining({ code: 'BAD_INPUT', hint: expect.any(String) }))
})
