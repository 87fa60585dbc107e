import { execFile } from 'node:child_process'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, expect, test } from '@jest/globals'
import { SegmentSealer } from '../../agent/journal/index.ts'
import type { SegmentInfo } from '../../agent/journal/index.ts'
import { temporaryDirectory } from '../../agent/journal/testing.ts'
import { ExtentSums, FileMirror, UNKNOWN_SUM } from '../../agent/mirror/index.ts'
import { ScrubKeeper } from '../../agent/scrub/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { FailingDisk } from '../lab/failing-disk.ts'
import { Random, testSeed } from '../kit/random.ts'
import { GROUP_VMS, RetentionSite } from '../kit/retention-site.ts'

// A disk of the recovery site has a block that cannot be read any more, or once not be written. A real file system over a real block device.

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

const NEXT_AGENT = `
const { FileMirror } = await import(process.argv[1])
await using mirror = await FileMirror.open(process.argv[2], Number(process.argv[3]))
await mirror.zero(Number(process.argv[4]), Number(process.argv[5]))
await mirror.datasync()`

test.each(['by the same agent', 'by one that was started again'])('zeroes of which the fdatasync failed are in memory, and not on the disk: written again %s, they are there', async (who) => {
  await using directory = await temporaryDirectory()
  await using disk = await FailingDisk.mount(join(directory.path, 'disk'), 64 * MiB)
  const path = join(disk.path, '0.raw')
  const [offsetBytes, lengthBytes] = [256 * 1024, 64 * 1024]
  const whatIsRead = async (): Promise<Buffer> => {
    await using mirror = await FileMirror.open(path, MiB)
    const bytes = Buffer.alloc(lengthBytes)
    await mirror.read(offsetBytes, bytes)
    return bytes
  }
  {
    await using mirror = await FileMirror.open(path, MiB)
    await mirror.write(0, [Buffer.alloc(MiB, 0xab)], MiB)
    await mirror.datasync()
  }
  await disk.failWriteOnce(path, offsetBytes + random.int(0, lengthBytes))
  {
    await using mirror = await FileMirror.open(path, MiB)
    await mirror.zero(offsetBytes, lengthBytes)
    await expect(mirror.datasync()).rejects.toMatchObject({ code: 'EIO' })
  }
  // The trap: what is read says that there is nothing to do.
  expect((await whatIsRead()).equals(Buffer.alloc(lengthBytes))).toBe(true)
  if (who === 'by the same agent') {
    await using mirror = await FileMirror.open(path, MiB)
    await mirror.zero(offsetBytes, lengthBytes)
    await mirror.datasync()
  } else {
    const args = [new URL('../../agent/mirror/index.ts', import.meta.url).href, path, MiB, offsetBytes, lengthBytes].map(String)
    await promisify(execFile)(process.execPath, ['--input-type=module', '--eval', NEXT_AGENT, ...args])
  }
  await disk.remount()
  expect((await whatIsRead()).equals(Buffer.alloc(lengthBytes))).toBe(true)
}, 60_000)

test('sums of which the fdatasync failed are forgotten: none that was replaced is ever read again', async () => {
  await using directory = await temporaryDirectory()
  await using disk = await FailingDisk.mount(join(directory.path, 'disk'), 64 * MiB)
  const path = join(disk.path, '0.sums')
  const sums = async <T>(work: (sums: ExtentSums) => Promise<T>): Promise<T> => {
    await using opened = await ExtentSums.open(path)
    return await work(opened)
  }
  const setTo = (sum: number) => sums(async (opened) => {
    await opened.set(7, sum)
    await opened.datasync()
  })
  await setTo(11)
  await sums(async (opened) => {
    await opened.set(2_000, 5)
    await opened.datasync()
  })
  await disk.failWriteOnce(path, 0)
  await expect(setTo(12)).rejects.toMatchObject({ code: 'EIO' })
  expect(await sums((opened) => opened.get(7))).toBe(UNKNOWN_SUM)
  await setTo(12)
  await disk.remount()
  expect(await sums((opened) => Promise.all([opened.get(7), opened.get(2_000)]))).toEqual([12, UNKNOWN_SUM])
}, 60_000)
