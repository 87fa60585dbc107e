import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { SegmentSealer } from '../../agent/journal/index.ts'
import { memoryDirectory } from '../../agent/journal/testing.ts'
import type { Pin } from '../../agent/recovery/index.ts'
import { DAY_MS, HOUR_MS } from '../../agent/retention/index.ts'
import { Random, testSeed } from '../kit/random.ts'
import { GROUP_VMS, RetentionSite } from '../kit/retention-site.ts'
import type { RetentionSiteOptions } from '../kit/retention-site.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())
const random = new Random(1)
const LIMITS = { segmentBytes: 1 << 20, segmentRecords: 64 }
const options = (directory: string, own: Partial<RetentionSiteOptions> = {}): RetentionSiteOptions => ({ directory, sealer, random, limits: LIMITS, ...own })

/** A checkpoint each minute, with a round each. */
const minutes = async (site: RetentionSite, count: number, cut: Parameters<RetentionSite['cut']>[0] = {}): Promise<void> => {
  for (let n = 0; n < count; n++) {
    site.pass(60_000)
    site.cut(cut)
    await site.flush()
    await site.keeper.round()
  }
}
const alarmIds = (site: RetentionSite): string[] => site.group.alarms.map(({ id, vm }) => (vm === undefined ? id : `${id} ${vm}`)).sort()
const ids = (site: RetentionSite): string[] => site.list().map(({ id }) => id)
const last = <T>(list: readonly T[]): T => list[list.length - 1]

test('history keeps its length, the group moves together, and a catalogue made again is the same', async () => {
  await using directory = await memoryDirectory()
  await using site = await RetentionSite.open(options(directory.path))
  await minutes(site, 100)
  const list = site.list()
  expect(list.length).toBe(61)
  expect(last(list).namedSeqs).toEqual(Object.fromEntries(GROUP_VMS.map((vm, at) => [vm, site.bases()[at]])))
  expect(site.group.state).toMatchObject({ oldest: { id: last(list).id, why: 'time' }, filledMs: HOUR_MS })
  expect(site.group.state.intent).toBeUndefined()
  await site.settle()
  await site.keeper.round()
  for (const vm of GROUP_VMS) {
    const { segments, baseSeq } = site.store(vm)
    expect(segments[0].lastSeq).toBeGreaterThan(baseSeq)
    expect((await readdir(join(site.vmDirectory(vm), 'journal'))).length).toBe(segments.length)
    expect((await site.store(vm).verify()).damage).toEqual([])
  }
  await site.expectExact(list)
  await site.keeper[Symbol.asyncDispose]()
  await site.registry[Symbol.asyncDispose]()
  await using again = await RetentionSite.open(options(directory.path), site)
  expect(again.list()).toEqual(list)
  await minutes(again, 30)
  expect(again.list().length).toBeGreaterThan(61)
  expect(again.list().length).toBeLessThanOrEqual(62)
  await again.expectExact(again.list())
}, 60_000)

test('labels that jump a year ahead and back again, and an agent whose wall clock does, give nothing away, and thin nothing out', async () => {
  await using directory = await memoryDirectory()
  await using site = await RetentionSite.open(options(directory.path, { policy: { thinning: [{ afterMs: HOUR_MS, everyMs: HOUR_MS }] } }))
  await minutes(site, 50)
  site.nowUnixMs += 365 * DAY_MS
  await minutes(site, 5)
  expect(site.list().length).toBe(55)
  site.nowUnixMs -= 730 * DAY_MS
  await minutes(site, 5)
  expect(site.list().length).toBe(60)
  await minutes(site, 40)
  // Labels stand still almost, and history goes on being an hour.
  expect(site.list().length).toBe(61)
  expect(alarmIds(site)).toEqual([])
  await site.expectExact(site.list())
})

test('while the source is silent, for days, nothing goes; restarts of the agent make history longer only', async () => {
  await using directory = await memoryDirectory()
  await using site = await RetentionSite.open(options(directory.path))
  await minutes(site, 59)
  for (let hour = 0; hour < 100; hour++) {
    site.pass(HOUR_MS)
    await site.keeper.round()
  }
  expect(site.list().length).toBe(59)
  await site.keeper[Symbol.asyncDispose]()
  await site.registry[Symbol.asyncDispose]()
  await using again = await RetentionSite.open(options(directory.path), site)
  again.monotonicMs = 5
  await minutes(again, 3)
  expect(again.list().length).toBeGreaterThanOrEqual(61)
})

test('a pin holds the base of its whole group until it is released; points above and below stay what they are', async () => {
  await using directory = await memoryDirectory()
  await using site = await RetentionSite.open(options(directory.path))
  await minutes(site, 65)
  const pinnedAt = site.list()[50]
  const pin = site.pins.pin(site.vmDirectory('102'), pinnedAt.namedSeqs['102'], 'failover test t1')
  await minutes(site, 60)
  expect(last(site.list()).id).toBe(pinnedAt.id)
  expect(site.group.heldBy).toBe('pin')
  expect(site.group.alarms).toMatchObject([{ id: 'retention.pinned', level: 'warn', message: expect.stringContaining('failover test t1') }])
  await site.expectExact(site.list())
  pin.release()
  await minutes(site, 1)
  expect([site.list().length, alarmIds(site), site.group.heldBy]).toEqual([61, [], undefined])
  expect(site.events.recent().map(({ kind, level }) => `${level} ${kind}`)).toEqual(['warn retention.pinned', 'info retention.pinned'])
})

test('pin and promotion: whoever comes first wins, and the other is told', async () => {
  await using directory = await memoryDirectory()
  let during: (() => void) | undefined
  await using site = await RetentionSite.open(options(directory.path, { pace: async () => during?.() }))
  await minutes(site, 60)
  const oldest = last(site.list())
  const place = site.vmDirectory('101')
  const late: Pin[] = []
  // While all that is needed is read, before anything is decided.
  during = () => {
    if (late.length === 0) late.push(site.pins.pin(place, oldest.namedSeqs['101'], 'just in time'))
  }
  await minutes(site, 3)
  expect(site.bases()[0]).toBeLessThanOrEqual(oldest.namedSeqs['101'])
  expect(site.store('101').base.promotingToSeq).toBeUndefined()
  await site.expectExact(site.list())
  late[0].release()
  const refusals: unknown[] = []
  during = () => {
    if (site.group.state.intent === undefined) return
    expect(ids(site)).not.toContain(oldest.id)
    try {
      site.pins.pin(place, oldest.namedSeqs['101'], 'too late').release()
    } catch (error) {
      refusals.push(error)
    }
  }
  await minutes(site, 1)
  expect(refusals.length).toBeGreaterThan(0)
  expect(refusals[0]).toMatchObject({ code: 'NOT_FOUND', hint: expect.any(String) })
  await site.expectRefused('101', oldest.namedSeqs['101'])
})

test('the agent ends between two VMs of a group: both get there, whatever is left of catalogue and state', async () => {
  for (const how of ['state and catalogue kept', 'catalogue lost']) {
    await using directory = await memoryDirectory()
    const cataloguePath = how === 'catalogue lost' ? ':memory:' : join(directory.path, 'catalogue.sqlite')
    let failing = false
    const own = { cataloguePath, pace: async () => {
      const { state } = site.group
      if (failing && state.intent !== undefined && site.bases()[0] === state.intent.seqs['101']) throw new Error('killed')
    } }
    await using site: RetentionSite = await RetentionSite.open(options(directory.path, own))
    await minutes(site, 60)
    failing = true
    await minutes(site, 5)
    const { intent } = site.group.state
    expect(site.bases()[0]).toBe(intent?.seqs['101'])
    expect(site.bases()[1]).toBeLessThan(intent?.seqs['102'] ?? 0)
    expect(alarmIds(site)).toContain('retention.failed')
    // What is offered meanwhile is exact.
    await site.expectExact(site.list())
    await site.keeper[Symbol.asyncDispose]()
    await site.registry[Symbol.asyncDispose]()
    await using again = await RetentionSite.open(options(directory.path, { cataloguePath }), site)
    expect(() => again.pins.pin(again.vmDirectory('102'), (intent?.seqs['102'] ?? 0) - 1, 'too low')).toThrow(expect.objectContaining({ code: 'NOT_FOUND' }))
    await again.expectExact(again.list())
    await again.keeper.round()
    // It was finished, and the same turn may have gone on from there.
    const { oldest } = again.group.state
    expect(again.group.state.intent).toBeUndefined()
    expect(again.bases()).toEqual(GROUP_VMS.map((vm) => oldest?.seqs[vm]))
    expect(again.bases()[1]).toBeGreaterThanOrEqual(intent?.seqs['102'] ?? 0)
    expect(last(again.list()).id).toBe(oldest?.id)
    await again.expectExact(again.list())
  }
})

test('suspect and pending checkpoints never become the oldest; a tagged one goes with its time', async () => {
  await using directory = await memoryDirectory()
  await using site = await RetentionSite.open(options(directory.path))
  await minutes(site, 3)
  await minutes(site, 1, { tag: 'before' })
  site.pass(60_000)
  site.cut({ vms: ['101'] })
  await minutes(site, 55)
  const suspect = site.list().slice(-10, -2)
  for (const entry of suspect.slice(0, 4)) site.catalogue.noteProof('site-a', '101', 1, entry.namedSeqs['101'], false)
  const good = new Set(site.list().filter(({ state }) => state === 'valid').map(({ id }) => id))
  const oldest = new Set<string>()
  for (let n = 0; n < 30; n++) {
    await minutes(site, 1)
    oldest.add(site.group.state.oldest?.id ?? '')
  }
  oldest.delete('')
  expect(oldest.size).toBeGreaterThan(4)
  for (const id of oldest) expect(good.has(id)).toBe(true)
  expect(site.list().some(({ tag }) => tag === 'before')).toBe(false)
})

test('over its limit a journal makes history shorter; held by a pin it may grow to the hard stop, refuses there, and goes on by itself', async () => {
  await using directory = await memoryDirectory()
  const limitBytes = 400_000
  await using site = await RetentionSite.open(options(directory.path, { policy: { journalLimitBytes: limitBytes } }))
  const fill = (): Promise<void> => minutes(site, 1, { writes: 8, maxSectors: 8 })
  while (site.keeper.group('site-a', 'shop')?.state.oldest === undefined) {
    await fill()
    await site.settle()
  }
  expect(site.group.state).toMatchObject({ oldest: { why: 'size' }, shortenedBy: 'size' })
  expect(alarmIds(site)).toContain('retention.history-short')
  for (const vm of GROUP_VMS) expect(site.store(vm).journalBytes).toBeLessThanOrEqual(limitBytes)
  const pinned = last(site.list())
  const pin = site.pins.pin(site.vmDirectory('101'), pinned.namedSeqs['101'], 'recovery point p9')
  const seen = new Set<string>()
  while (site.store('101').condition === 'open' && site.store('102').condition === 'open') {
    await fill().catch(() => undefined)
    await site.settle()
    for (const alarm of alarmIds(site)) seen.add(alarm)
  }
  await site.keeper.round()
  for (const alarm of alarmIds(site)) seen.add(alarm)
  expect([...seen].filter((id) => id.startsWith('retention.over-limit')).length).toBeGreaterThan(0)
  expect([...seen].filter((id) => id.startsWith('retention.hard-stop')).length).toBeGreaterThan(0)
  const full = GROUP_VMS.filter((vm) => site.store(vm).condition === 'full')
  for (const vm of full) {
    expect(site.store(vm).journalBytes).toBeLessThan(limitBytes * 1.5 + 70_000)
    await expect(site.store(vm).resumeEpoch(1)).rejects.toMatchObject({ code: 'IO', message: expect.stringContaining('hard stop'), context: { condition: 'full' } })
  }
  await site.expectExact(site.list())
  pin.release()
  for (let n = 0; n < 4; n++) await site.keeper.round()
  for (const vm of full) expect((await site.store(vm).resumeEpoch(1)).durableSeq).toBe(site.store(vm).durableSeq)
  for (const vm of GROUP_VMS) expect(site.store(vm).journalBytes).toBeLessThanOrEqual(limitBytes)
  await site.expectExact(site.list())
}, 60_000)

test('below the reserve of its file system history gets shorter by what is missing, and grows again', async () => {
  await using directory = await memoryDirectory()
  await using site = await RetentionSite.open(options(directory.path))
  site.reserve.reserveBytes = 1e9
  await minutes(site, 58)
  await site.settle()
  const before = site.list().length
  site.space = { freeBytes: 1e9 - 100_000, totalBytes: 2e12 }
  await minutes(site, 1)
  const { length } = site.list()
  expect(length).toBeLessThan(before)
  expect(length).toBeGreaterThan(before / 2)
  expect(alarmIds(site)).toContain('retention.reserve')
  site.space = { freeBytes: 1e12, totalBytes: 2e12 }
  await minutes(site, 60)
  expect([site.list().length, alarmIds(site)]).toEqual([61, []])
  await site.expectExact(site.list())
})

test('with age the list gets thinner; tagged ones stay; made again from the journals it is thinned to the same', async () => {
  await using directory = await memoryDirectory()
  const policy = { historyMs: 3 * HOUR_MS, thinning: [{ afterMs: 20 * 60_000, everyMs: 60_000 }, { afterMs: HOUR_MS, everyMs: 10 * 60_000 }] }
  await using site = await RetentionSite.open(options(directory.path, { policy, limits: { segmentBytes: 1 << 20, segmentRecords: 512 } }))
  for (let n = 0; n < 4 * 60 * 6; n++) {
    site.pass(10_000)
    site.cut({ writes: 1, ...(n % 500 === 321 ? { tag: `t${n}` } : {}) })
    if (n % 6 !== 5) continue
    await site.flush()
    await site.keeper.round()
  }
  const list = site.list()
  expect(list.filter(({ tag }) => tag !== undefined).length).toBe(2)
  const newest = list[0].atUnixMs
  const between = (from: number, to: number): number => list.filter(({ atUnixMs, tag }) => tag === undefined && newest - atUnixMs >= from && newest - atUnixMs < to).length
  expect(list.filter(({ atUnixMs }) => newest - atUnixMs < 20 * 60_000).length).toBe(120)
  expect(Math.abs(between(20 * 60_000, HOUR_MS) - 40)).toBeLessThanOrEqual(8)
  expect(Math.abs(between(HOUR_MS, 4 * HOUR_MS) - 12)).toBeLessThanOrEqual(2)
  await site.keeper[Symbol.asyncDispose]()
  await site.registry[Symbol.asyncDispose]()
  await using again = await RetentionSite.open(options(directory.path, { policy }), site)
  expect(again.list().length).toBeGreaterThan(list.length)
  await again.keeper.round()
  expect(again.list()).toEqual(list)
  await again.expectExact(list.filter((_, at) => at % 10 === 0))
}, 60_000)

test('what there was before a VM was changed behind our back is kept by a name, where the list gets thinner too; if nothing was changed, nothing is', async () => {
  await using directory = await memoryDirectory()
  const policy = { historyMs: 3 * HOUR_MS, thinning: [{ afterMs: 5 * 60_000, everyMs: HOUR_MS }] }
  await using site = await RetentionSite.open(options(directory.path, { policy }))
  await minutes(site, 20)
  const before = site.list()[0].id
  site.rewrite('101', 'begin', 'before VM 101 was started')
  await site.flush()
  for (let n = 0; n < 20; n++) {
    site.pass(60_000)
    await site.keeper.round()
  }
  expect([ids(site).includes(before), site.list().filter(({ tag }) => tag !== undefined)]).toEqual([true, []])
  site.rewrite('101', 'all', 'before VM 101 was started')
  await minutes(site, 5)
  const unchanged = site.list()[0].id
  site.compare('102', 'before VM 102 was started')
  await minutes(site, 20)
  const kept = site.list().filter(({ tag }) => tag !== undefined)
  expect(kept.map(({ id, tag }) => [id, tag])).toEqual([[before, 'before VM 101 was started']])
  expect(ids(site)).not.toContain(unchanged)
  expect(site.events.recent().filter(({ kind }) => kind === 'checkpoint.kept').map(({ message }) => message)).toEqual([expect.stringContaining(`checkpoint ${before} of`)])
  await site.expectExact(kept)
  const list = site.list()
  await site.keeper[Symbol.asyncDispose]()
  await site.registry[Symbol.asyncDispose]()
  await using again = await RetentionSite.open(options(directory.path, { policy }), site)
  expect(again.list().filter(({ tag }) => tag !== undefined)).toEqual([])
  await again.keeper.round()
  expect(again.list()).toEqual(list)
}, 60_000)

test('random histories of a group: kills anywhere, pins, restarts with and without the catalogue; all that is listed is exact', async () => {
  const seed = testSeed()
  console.log(`seed ${seed}`)
  const dice = new Random(seed)
  for (let round = 0; round < (process.env.CDP_ALL === undefined ? 2 : 30); round++) {
    await using directory = await memoryDirectory()
    let killAt = Infinity
    let paces = 0
    const open = async (from?: RetentionSite): Promise<RetentionSite> => {
      const cataloguePath = dice.chance(0.5) ? join(directory.path, 'catalogue.sqlite') : ':memory:'
      return RetentionSite.open(options(directory.path, {
        random: dice, cataloguePath, limits: { segmentBytes: 1 << 20, segmentRecords: dice.int(20, 200) }, policy: { thinning: [{ afterMs: 40 * 60_000, everyMs: 300_000 }] },
        stepBytes: dice.chance(0.5) ? 100_000 : 1 << 30,
        pace: async () => {
          if (++paces >= killAt) throw new Error('killed')
        },
      }), from)
    }
    let site = await open()
    let pins: Pin[] = []
    let bases = site.bases()
    let kills = 0
    await minutes(site, 60)
    for (let step = 0; step < 25; step++) {
      paces = 0
      killAt = dice.chance(0.7) ? dice.int(1, 12) : Infinity
      const list = site.list()
      if (list.length > 0 && dice.chance(0.2)) {
        const entry = list[dice.int(0, list.length)]
        for (const vm of GROUP_VMS) pins.push(site.pins.pin(site.vmDirectory(vm), entry.namedSeqs[vm], 'a test'))
      }
      await minutes(site, dice.int(1, 15), { writes: dice.int(0, 4), maxSectors: 12, ...(dice.chance(0.1) ? { tag: 'x' } : {}) })
      if (paces >= killAt) kills++
      const now = site.bases()
      now.forEach((base, at) => expect(base).toBeGreaterThanOrEqual(bases[at]))
      bases = now
      const offered = site.list()
      await site.expectExact(offered.filter((_, at) => at < 2 || at > offered.length - 4 || dice.chance(0.1)))
      if (dice.chance(0.4)) {
        for (const pin of pins) pin.release()
        pins = []
      }
      if (!dice.chance(0.35)) continue
      await site.keeper[Symbol.asyncDispose]()
      await site.registry[Symbol.asyncDispose]()
      const next = await open(site)
      await site[Symbol.asyncDispose]()
      site = next
      pins = []
    }
    killAt = Infinity
    await minutes(site, 3)
    await site.expectExact(site.list())
    for (const vm of GROUP_VMS) expect((await site.store(vm).verify()).damage).toEqual([])
    await site[Symbol.asyncDispose]()
    console.log(`round ${round}: ${kills} kills`)
  }
}, 600_000)
