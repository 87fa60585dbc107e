import { afterAll, expect, test } from '@jest/globals'
import { SegmentSealer } from '../../agent/journal/index.ts'
import { memoryDirectory } from '../../agent/journal/testing.ts'
import { Random, testSeed } from '../kit/random.ts'
import { RetentionSite, SITE, VPG } from '../kit/retention-site.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

const MINUTE_MS = 60_000
const LIMIT_BYTES = 4 * 2 ** 20

test('a day of checkpoints every 5 s with a history of an hour: limits hold, the oldest only moves on, what is listed is what can be recovered', async () => {
  const seed = testSeed()
  console.log(`seed ${seed}`)
  const random = new Random(seed)
  await using directory = await memoryDirectory()
  await using site = await RetentionSite.open({
    directory: directory.path, sealer, random, limits: { segmentBytes: 256 * 1024, segmentRecords: 1024 }, policy: { historyMs: 60 * MINUTE_MS, journalLimitBytes: LIMIT_BYTES },
  })
  let bases = site.bases()
  let moves = 0
  let largestBytes = 0
  const seen = new Set<string>()
  const checked = { listed: 0, gone: 0 }
  const gone: Record<string, number>[] = []
  for (let minute = 2; minute <= 24 * 60; minute += 2) {
    // Three hours in the afternoon are busy: the limit of size makes the history shorter.
    const isBusy = minute > 14 * 60 && minute <= 17 * 60
    for (let n = 0; n < 24; n++) {
      site.pass(5000)
      site.cut(isBusy ? { writes: 6, maxSectors: 12 } : { writes: 2, maxSectors: 3 })
      if (n % 12 === 11) await site.flush()
    }
    await site.settle()
    const before = site.catalogue.oldest(SITE, VPG)
    await site.keeper.round()
    const after = site.catalogue.oldest(SITE, VPG)
    if (before !== undefined && before.id !== after?.id) gone.push(before.namedSeqs)
    const now = site.bases()
    now.forEach((base, at) => expect(base).toBeGreaterThanOrEqual(bases[at]))
    if (now[0] > bases[0]) moves++
    bases = now
    for (const vm of ['101', '102']) largestBytes = Math.max(largestBytes, site.store(vm).journalBytes)
    for (const { id } of site.group.alarms) seen.add(id)
    const lengthMs = site.nowUnixMs - (after?.atUnixMs ?? 0)
    if (minute === 13 * 60 || minute === 24 * 60) {
      // Quiet hours: exactly the configured time, to a step.
      expect(lengthMs).toBeGreaterThanOrEqual(60 * MINUTE_MS)
      expect(lengthMs).toBeLessThan(63 * MINUTE_MS)
      expect(site.group.alarms).toEqual([])
    }
    if (minute === 17 * 60) {
      expect(lengthMs).toBeLessThan(45 * MINUTE_MS)
      expect(site.group.alarms.map(({ id, level }) => [id, level])).toContainEqual(['retention.history-short', 'error'])
      expect(site.group.state.shortenedBy).toBe('size')
    }
    if (minute % (6 * 60) !== 0) continue
    const list = site.list()
    for (const entry of list) for (const [at, vm] of ['101', '102'].entries()) expect(entry.namedSeqs[vm]).toBeGreaterThanOrEqual(bases[at])
    const sample = [list[0], list[list.length - 1], ...Array.from({ length: 8 }, () => list[random.int(0, list.length)])]
    await site.expectExact(sample)
    checked.listed += sample.length
    for (const namedSeqs of gone.slice(-4)) {
      for (const vm of ['101', '102']) await site.expectRefused(vm, namedSeqs[vm])
      checked.gone++
    }
  }
  expect(largestBytes).toBeLessThanOrEqual(LIMIT_BYTES)
  expect(moves).toBeGreaterThan(600)
  expect(checked).toEqual({ listed: 40, gone: 16 })
  expect([...seen].sort()).toEqual(['retention.history-short', 'retention.journal-large'])
  // The list made again from the journals is the same list.
  const live = site.list()
  const fresh = { directory: directory.path, sealer, random, policy: { historyMs: 60 * MINUTE_MS, journalLimitBytes: LIMIT_BYTES } }
  await site.keeper[Symbol.asyncDispose]()
  await site.registry[Symbol.asyncDispose]()
  await using again = await RetentionSite.open(fresh, site)
  expect(again.list()).toEqual(live)
}, 120_000)
