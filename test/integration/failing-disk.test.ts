import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { SegmentSealer } from '../../agent/journal/index.ts'
import type { SegmentInfo } from '../../agent/journal/index.ts'
import { temporaryDirectory } from '../../agent/journal/testing.ts'
import { ScrubKeeper } from '../../agent/scrub/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { FailingDisk } from '../lab/failing-disk.ts'
import { Random, testSeed } from '../kit/random.ts'
import { GROUP_VMS, RetentionSite } from '../kit/retention-site.ts'

// A disk of the recovery site has a block that cannot be read any more. A real file system over a real block device.

const MiB = 1 << 20
const seed = testSeed()
const random = new Random(seed)
const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

const optionsOf = (directory: string) => ({
  directory, sealer, random, policy: { historyMs: 3_600_000 }, limits: { segmentBytes: MiB, segmentRecords: 24 }, cataloguePath: join(directory, 'catalogue.sqlite'),
})
const scrubOf = (site: RetentionSite, asked: string[]): ScrubKeeper => new ScrubKeeper({
  vms: () => site.registry.list(), catalogue: site.catalogue, events: site.events, log: silentLogger, everyMs: 604_800_000, rateBytesPerSec: 1e12,
  nowUnixMs: () => site.nowUnixMs, monotonicMs: () => site.monotonicMs, lookEveryMs: 1 << 30, askForSync: (_, vm) => asked.push(vm) > 0,
})
const minutes = async (site: RetentionSite, count: number): Promise<void> => {
  for (let n = 0; n < count; n++) {
    site.cut({ writes: random.int(1, 5), maxSectors: 48 })
    site.pass(60_000)
  }
  await site.flush()
}
const damagedIds = (site: RetentionSite): string[] => site.list().filter(({ state }) => state === 'damaged').map(({ id }) => id).sort()
const isUnreadable = async (path: string, offsetBytes: number): Promise<boolean> => {
  await using file = await open(path)
  return file.read(Buffer.alloc(1), 0, 1, offsetBytes).then(() => false, ({ code }: NodeJS.ErrnoException) => code === 'EIO')
}

const places: [string, (segment: SegmentInfo) => number][] = [
  ['in its middle', ({ framesEndBytes }) => random.int(4096, framesEndBytes - 8192)],
  ['at its head', () => 0],
  ['at its end', ({ fileBytes }) => fileBytes - 1],
]
test.each(places)('a sector of a segment that cannot be read, %s: what needs it is shown as damaged and refused, nothing else; ingest goes on, and a sync heals', async (where, placeIn) => {
  console.log(`seed ${seed}`)
  await using directory = await temporaryDirectory()
  await using disk = await FailingDisk.mount(join(directory.path, 'disk'), 64 * MiB)
  const options = optionsOf(disk.path)
  const vm = GROUP_VMS[random.int(0, GROUP_VMS.length)]
  const asked: string[] = []
  const [before, bad, badAt] = await (async () => {
    await using site = await RetentionSite.open(options)
    await minutes(site, 30)
    await site.settle()
    await using scrub = scrubOf(site, asked)
    await scrub.round()
    expect(damagedIds(site)).toEqual([])
    const sealed = site.store(vm).segments.filter((one) => one.sealed)
    const segment = sealed.filter(({ framesEndBytes }) => framesEndBytes > 32 * 1024)[0]
    return [site, segment, placeIn(segment)] as const
  })()
  await disk.failReads(bad.path, badAt)
  expect(await isUnreadable(bad.path, badAt)).toBe(true)

  await using site = await RetentionSite.open(options, before)
  await using scrub = scrubOf(site, asked)
  await minutes(site, 2)
  await scrub.want(site.registry.list())
  await scrub.round()
  const lost = await site.unreadable(['JOURNAL_DAMAGED', 'EIO'])
  if (where !== 'at its end') expect(lost.length).toBeGreaterThan(0)
  // The scrub gives up the whole segment: more may be shown than is lost, and none less.
  expect(damagedIds(site)).toEqual(expect.arrayContaining(lost))
  await site.expectExact(site.list().filter(({ state }) => state !== 'damaged'))
  // At its end stands also what says of which extents it is: without that nobody knows what a sync would have to mend.
  if (where === 'at its end') return
  expect(asked).toContain(vm)

  site.rewrite(vm)
  await minutes(site, 1)
  for (let n = 0; n < 36; n++) {
    site.cut({ writes: 1 })
    await site.flush()
    site.pass(180_000)
    await site.keeper.round()
    if (n % 4 === 0) await scrub.round()
  }
  await scrub.round()
  expect(site.store(vm).baseSeq).toBeGreaterThan(bad.lastSeq)
  expect(damagedIds(site)).toEqual([])
  await site.expectExact(site.list())
}, 120_000)
