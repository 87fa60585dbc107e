import { afterAll, beforeAll, expect, test } from '@jest/globals'
import { mkdirSync } from 'node:fs'
import type { Checkpoint } from '../../core/api/index.ts'
import { Random, testSeed } from '../kit/random.ts'
import { bootGuest, checkPrefix, createOverlay, durableRecord, GroupWriter, readJournal, startJournalWriter, untilRecord, type Guest, type PrefixReport } from '../lab/index.ts'
import { closeQuiet, PointImages, type JournalPlace } from './point-images.ts'
import { atRandom, BOOT_DEADLINE_MS, DIRS, explained, KEYS, TwoSites, VMS, VPG } from './two-sites.ts'

const CHECKPOINTS = process.env.CDP_ALL ? 20 : 4
const BOOTS = process.env.CDP_ALL ? 6 : 2
/** Dependent records go from the first disk of one VM to the second disk of the other. */
const GROUP: readonly JournalPlace[] = [{ vmId: 101, key: 'scsi0', folder: '/group' }, { vmId: 102, key: 'scsi1', folder: '/group' }]
const alone = (vmId: number): JournalPlace[] => KEYS.map((key) => ({ vmId, key }))

/** A tagged checkpoint and what was durable in the guests before the tag was asked for. */
type Taken = { checkpoint: Checkpoint; durable: Map<number, number>; durableInGroup: number; digests: Record<string, string> }

let all: TwoSites
let group: GroupWriter
const taken: Taken[] = []

beforeAll(async () => {
  all = await TwoSites.start()
  await explained(all, () => all.protect())
  for (const guest of all.guests) startJournalWriter(guest, DIRS)
  group = new GroupWriter(GROUP.map(({ vmId, key, folder }) => ({ guest: all.guest(vmId), dir: `/mnt/${key}${folder}` })))
  await Promise.all(all.guests.map((guest) => untilRecord(guest, 40)))
}, 400_000)

afterAll(async () => {
  await all?.[Symbol.asyncDispose]()
}, 60_000)

const expectPrefix = (report: PrefixReport, atLeast: number): void => {
  expect(report).toMatchObject({ ok: true })
  expect(report.last).toBeGreaterThanOrEqual(atLeast)
}

test(`${CHECKPOINTS} checkpoints at random moments under fsync load: ext4 clean, contents a prefix within each VM and over both, all that was durable is there`, async () => {
  const random = new Random(testSeed())
  console.log(`seed ${random.seed}`)
  await explained(all, async () => {
    for (let number = 1; number <= CHECKPOINTS; number++) {
      await atRandom(random, 200, 2_000)
      const durable = new Map(await Promise.all(all.guests.map(async (guest) => [guest.vm.vmId, await durableRecord(guest)] as const)))
      const durableInGroup = group.durable
      const checkpoint = await all.tag(`moment ${number}`)
      using point = await PointImages.copy(all.sites, VPG, checkpoint.id)
      taken.push({ checkpoint, durable, durableInGroup, digests: point.digests() })
      expect(await point.ext4Problems()).toEqual([])
      for (const { vmId } of VMS) expectPrefix(await point.prefix(alone(vmId)), durable.get(vmId)!)
      expectPrefix(await point.prefix(GROUP), durableInGroup)
    }
  })
  expect((await all.vpg()).state).toBe('protected')
  expect(taken.at(-1)!.durable.get(101)).toBeGreaterThan(taken[0].durable.get(101)!)
  console.log(`durable records at the tags: ${taken.map(({ durable, durableInGroup }) => [...durable.values(), durableInGroup].join('/')).join(', ')}`)
}, 400_000)

test('older checkpoints give the same bytes after later ones were cut', async () => {
  for (const { checkpoint, digests } of taken.slice(0, -1)) {
    using again = await PointImages.copy(all.sites, VPG, checkpoint.id)
    expect(again.digests()).toEqual(digests)
  }
  const [first, last] = [taken[0], taken.at(-1)!]
  expect(Object.values(first.digests)).not.toEqual(Object.values(last.digests))
}, 200_000)

test(`both guests boot from ${BOOTS} of them, at one time each, while the protected ones go on`, async () => {
  const random = new Random(testSeed())
  const chosen = taken.toSorted(() => random.int(0, 3) - 1).slice(0, BOOTS)
  for (const [index, { checkpoint, durable, durableInGroup }] of chosen.entries()) {
    const point = await all.sites.openPoint(VPG, checkpoint.id)
    const rootDir = `${all.rootDir}/r${index}`
    mkdirSync(rootDir)
    const booted = await Promise.all(VMS.map(async ({ vmId, shape }): Promise<[number, Guest]> => {
      const disks = await Promise.all(point.disks.filter((disk) => disk.vmId === vmId).map(async ({ key, uri, sizeBytes }) => {
        const path = `${rootDir}/${vmId}-${key}.qcow2`
        await createOverlay(path, uri, sizeBytes)
        return { key, path, format: 'qcow2' as const }
      }))
      return [vmId, await bootGuest({ rootDir, vmId: vmId + 800, shape, disks, mount: KEYS, deadlineMs: BOOT_DEADLINE_MS })]
    }))
    await using stack = new AsyncDisposableStack()
    for (const [, guest] of booted) stack.use(guest)
    const guests = new Map(booted)
    console.log(`"${checkpoint.tag}" answers ${booted.map(([vmId, guest]) => `as VM ${vmId + 800} after ${Math.round(guest.bootMs)} ms`).join(', ')}`)
    for (const [vmId, guest] of guests) {
      expectPrefix(checkPrefix(await Promise.all(DIRS.map((dir) => readJournal(guest, dir)))), durable.get(vmId)!)
      // It is a system to work with, not only to look at.
      await guest.check('journal-writer after 10 /mnt/scsi0/new /mnt/scsi1/new', { deadlineMs: 60_000 })
      expect(await guest.check('dmesg | grep -ci "ext4-fs error\\|i/o error" || true')).toBe('0\n')
    }
    expectPrefix(checkPrefix(await Promise.all(GROUP.map(({ vmId, key, folder }) => readJournal(guests.get(vmId)!, `/mnt/${key}${folder}`)))), durableInGroup)
    await stack.disposeAsync()
    await closeQuiet(all.sites, point.pointId)
  }
  const before = await durableRecord(all.guest(101))
  await untilRecord(all.guest(101), before + 5)
  expect(await group.stop()).toBeGreaterThan(taken.at(-1)!.durableInGroup)
  expect((await all.sites.untilProtected(VPG)).vms.map(({ state }) => state)).toEqual(['streaming', 'streaming'])
}, 600_000)
