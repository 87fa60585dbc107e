import { existsSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { SegmentSealer } from '../../agent/journal/index.ts'
import { memoryDirectory } from '../../agent/journal/testing.ts'
import { Random } from '../kit/random.ts'
import { GROUP_VMS, RetentionSite } from '../kit/retention-site.ts'
import { fillUp, smallFileSystem } from '../kit/small-file-system.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

const LIMITS = { segmentBytes: 1 << 20, segmentRecords: 256 }
const DENSE = { writes: 10, maxSectors: 16 }

const minutes = async (site: RetentionSite, count: number): Promise<void> => {
  for (let n = 0; n < count; n++) {
    site.pass(60_000)
    site.cut(DENSE)
    await site.flush()
    await site.keeper.round()
  }
}
/** A checkpoint for each minute, without a look at the history. */
const minutesUnseen = async (site: RetentionSite, count: number): Promise<void> => {
  for (let n = 0; n < count; n++) {
    site.pass(60_000)
    site.cut(DENSE)
    await site.flush()
  }
}
const alarms = (site: RetentionSite): string[] => site.group.alarms.map(({ id, level }) => `${level} ${id}`)

test('no room for the state of the group: nothing is given up, all stays readable, and it goes on by itself', async () => {
  await using disk = await smallFileSystem(64)
  await using site = await RetentionSite.open({ directory: disk.path, sealer, random: new Random(1), limits: LIMITS })
  await minutes(site, 62)
  await minutesUnseen(site, 10)
  const before = { list: site.list(), bases: site.bases() }
  const makeRoom = await fillUp(disk.path, 0)
  await site.keeper.round()
  expect(alarms(site)).toEqual(['error retention.no-room'])
  expect({ list: site.list(), bases: site.bases() }).toEqual(before)
  await site.expectExact(before.list)
  // What could not be begun keeps nobody from opening what is still there.
  site.pins.pin(site.vmDirectory('101'), before.bases[0], 'a test').release()
  await makeRoom()
  await minutes(site, 2)
  expect(alarms(site)).toEqual([])
  expect(site.bases()[0]).toBeGreaterThan(before.bases[0])
  await site.expectExact(site.list())
}, 120_000)

test('no room in the mirror: what is above stays exact beside the half of it, and it goes on by itself', async () => {
  await using disk = await smallFileSystem(64)
  await using site = await RetentionSite.open({ directory: disk.path, sealer, random: new Random(2), limits: LIMITS })
  await minutes(site, 62)
  await minutesUnseen(site, 30)
  // The state files fit, the mirrors do not.
  const makeRoom = await fillUp(disk.path, 72 * 1024)
  await site.keeper.round()
  expect(alarms(site)).toEqual(['error retention.no-room'])
  expect(site.group.state.intent).toBeDefined()
  expect(GROUP_VMS.some((vm) => site.store(vm).base.promotingToSeq !== undefined)).toBe(true)
  await site.expectExact(site.list())
  for (const vm of GROUP_VMS) if (site.store(vm).base.promotingToSeq !== undefined) await site.expectRefused(vm, (site.store(vm).base.promotingToSeq ?? 0) - 1)
  await makeRoom()
  await site.keeper.round()
  expect([alarms(site), site.group.state.intent]).toEqual([[], undefined])
  await site.expectExact(site.list())
}, 120_000)

test('no room in the catalogue: no mirror is touched, and it goes on by itself', async () => {
  await using disk = await smallFileSystem(8)
  await using directory = await memoryDirectory()
  await using site = await RetentionSite.open({ directory: directory.path, sealer, random: new Random(3), limits: LIMITS, cataloguePath: join(disk.path, 'catalogue.sqlite') })
  await minutes(site, 62)
  await minutesUnseen(site, 10)
  const before = { list: site.list(), bases: site.bases() }
  const makeRoom = await fillUp(disk.path, 0)
  await site.keeper.round()
  expect(alarms(site)).toEqual(['error retention.no-room'])
  expect({ list: site.list(), bases: site.bases() }).toEqual(before)
  for (const vm of GROUP_VMS) expect(site.store(vm).base.promotingToSeq).toBeUndefined()
  await site.expectExact(before.list)
  await makeRoom()
  await site.keeper.round()
  expect(alarms(site)).toEqual([])
  expect(site.bases()[0]).toBeGreaterThan(before.bases[0])
  await site.expectExact(site.list())
}, 120_000)

test('damage on the way: history stops before it with an alarm, what was before it stays recoverable, and the damaged segment stays', async () => {
  await using directory = await memoryDirectory()
  await using site = await RetentionSite.open({ directory: directory.path, sealer, random: new Random(4), limits: LIMITS })
  await minutes(site, 70)
  await site.settle()
  const { segments } = site.store('102')
  const damaged = segments[Math.floor(segments.length / 2)]
  expect(damaged.sealed).toBe(true)
  const file = await open(damaged.path, 'r+')
  await file.write(Buffer.from('not what was written'), 0, 20, Math.floor(damaged.framesEndBytes / 2))
  await file.close()
  await minutes(site, 60)
  expect(alarms(site)).toContain('error retention.damaged')
  expect(site.group.heldBy).toBe('damage')
  const [damage] = site.store('102').damage()
  expect(site.bases()[1]).toBeLessThan(damage.firstSeq)
  expect(existsSync(damaged.path)).toBe(true)
  expect(site.store('102').base.promotingToSeq).toBeUndefined()
  const whole = site.list().filter(({ namedSeqs }) => namedSeqs['102'] < damage.firstSeq)
  expect(whole.length).toBeGreaterThan(0)
  // The last ones may lie in the damaged segment: their index is made of its frames up to them, and those are whole.
  await site.expectExact(whole)
  await minutes(site, 5)
  expect(existsSync(damaged.path)).toBe(true)
  expect(site.group.state.oldest?.seqs['102']).toBe(site.bases()[1])
}, 120_000)
