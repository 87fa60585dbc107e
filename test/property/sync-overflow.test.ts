import { afterAll, expect, test } from '@jest/globals'
import { SegmentSealer } from '../../agent/journal/index.ts'
import { memoryDirectory } from '../../agent/journal/testing.ts'
import type { SyncOverflow } from '../../agent/retention/index.ts'
import { Random } from '../kit/random.ts'
import { RetentionSite } from '../kit/retention-site.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

const VM = '101'
const LIMIT_BYTES = 1_000_000
const HARD_STOP_BYTES = 2_000_000

const siteOf = (directory: string, syncOverflow: SyncOverflow, cataloguePath = ':memory:'): Promise<RetentionSite> =>
  RetentionSite.open({
    directory, sealer, random: new Random(5), cataloguePath, limits: { segmentBytes: 64 * 1024, segmentRecords: 128 },
    policy: { historyMs: 24 * 3_600_000, journalLimitBytes: LIMIT_BYTES, hardStopBytes: HARD_STOP_BYTES, syncOverflow },
  })

/** Some history, which fits. */
const history = async (site: RetentionSite): Promise<void> => {
  for (let n = 0; n < 25; n++) {
    site.pass(60_000)
    site.cut({ writes: 4, maxSectors: 16 })
    await site.flush()
  }
  await site.settle()
  await site.keeper.round()
  expect(site.store(VM).journalBytes).toBeLessThan(LIMIT_BYTES * 0.9)
}

/** A sync of which each part is as large as all disks; no checkpoint comes before its end. */
const part = async (site: RetentionSite, which: 'begin' | 'all' = 'begin'): Promise<void> => {
  site.rewrite(VM, which)
  await site.flush()
  await site.settle()
  await site.keeper.round()
}
const alarms = (site: RetentionSite): string[] => site.group.alarms.map(({ id, level }) => `${level} ${id}`).sort()
const ids = (site: RetentionSite): string[] => site.list().map(({ id }) => id)

test('grow: a sync that does not fit costs no history, up to the hard stop; once it has ended the limit holds again', async () => {
  await using directory = await memoryDirectory()
  await using site = await siteOf(directory.path, 'grow')
  await history(site)
  const before = ids(site)
  while (site.store(VM).journalBytes < LIMIT_BYTES * 1.3) await part(site)
  expect({ ids: ids(site), condition: site.store(VM).condition, alarms: alarms(site) }).toEqual({ ids: before, condition: 'open', alarms: ['warn retention.over-limit'] })
  await part(site, 'all')
  site.cut()
  await site.flush()
  for (let n = 0; n < 4; n++) {
    await site.keeper.round()
    await site.settle()
  }
  expect(site.list().length).toBeLessThan(before.length)
  expect(site.store(VM).journalBytes).toBeLessThan(LIMIT_BYTES)
  await site.expectExact(site.list())
}, 60_000)

test('grow: at the hard stop the journal takes nothing more, and all history is there', async () => {
  await using directory = await memoryDirectory()
  await using site = await siteOf(directory.path, 'grow')
  await history(site)
  const before = ids(site)
  for (let n = 0; n < 8 && site.store(VM).condition === 'open'; n++) await part(site)
  expect({ ids: ids(site), condition: site.store(VM).condition, alarms: alarms(site) }).toEqual({ ids: before, condition: 'full', alarms: ['error retention.hard-stop'] })
  await site.expectExact(site.list())
}, 60_000)

test('pause: at the limit the journal takes nothing of a sync, all history stays, and it goes on when the choice is another one', async () => {
  await using directory = await memoryDirectory()
  await using site = await siteOf(directory.path, 'pause')
  await history(site)
  const before = ids(site)
  for (let n = 0; n < 8 && site.store(VM).condition === 'open'; n++) await part(site)
  const { journalBytes } = site.store(VM)
  expect({ ids: ids(site), condition: site.store(VM).condition, alarms: alarms(site) }).toEqual({ ids: before, condition: 'full', alarms: ['error retention.sync-paused'] })
  expect(journalBytes).toBeLessThan(LIMIT_BYTES + 500_000)
  await expect(site.store(VM).resumeEpoch(1)).rejects.toMatchObject({ message: expect.stringContaining('is paused') as unknown, context: { condition: 'full' } })
  await site.group.set({ syncOverflow: 'grow' })
  await site.keeper.round()
  await site.store(VM).resumeEpoch(1)
  expect(site.store(VM).condition).toBe('open')
  await site.expectExact(site.list())
}, 60_000)

test('give-up: history goes as far as the sync needs it, the last checkpoint before the sync is tagged and stays, also over a restart without the catalogue', async () => {
  await using directory = await memoryDirectory()
  const site = await siteOf(directory.path, 'give-up')
  await history(site)
  const before = ids(site)
  for (let n = 0; n < 3; n++) await part(site)
  const tagged = site.list().filter(({ tag }) => tag !== undefined)
  expect(tagged.map(({ id }) => id)).toEqual([before[0]])
  expect(site.list().length).toBeLessThan(before.length)
  expect(site.events.recent().filter(({ kind }) => kind === 'retention.gave-up')).toHaveLength(1)
  await site.expectExact(site.list())
  await site[Symbol.asyncDispose]()
  // The catalogue was in memory.
  await using again = await siteOf(directory.path, 'give-up')
  expect(again.list().find(({ tag }) => tag !== undefined)?.id).toBe(before[0])
}, 60_000)
