import { afterAll, beforeAll, expect, test } from '@jest/globals'
import { randomFillSync } from 'node:crypto'
import { globSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { pluginApi, type VmStatus } from '../../core/api/index.ts'
import { durableRecord, makeTempDir, startJournalWriter, untilRecord } from '../lab/index.ts'
import { until } from '../lab/sites.ts'
import { PointImages } from './point-images.ts'
import { DIRS, explained, KEYS, PROTECTED_DEADLINE_MS, TwoSites, VMS, VPG } from './two-sites.ts'

// Two real guests: one is stopped hard, agent and plugin are killed in the middle of comparisons, and a byte rots at the recovery site.

const MiB = 1 << 20
const DISK_BYTES = 64 * MiB
const DELTA_COMPLETE = /^delta sync complete, (\d+) bytes sent$/
/** Of the two disks of a VM, so much may go over the link when little has changed. */
const FAR_BELOW = 0.25

const random = randomFillSync(Buffer.alloc(16 * MiB))
/** How often each guest was booted: each life writes a journal of its own. */
const lives = new Map(VMS.map(({ vmId }) => [vmId, 0]))
let all: TwoSites

beforeAll(async () => {
  await using files = makeTempDir()
  mkdirSync(`${files.path}/content`)
  writeFileSync(`${files.path}/content/random`, random)
  all = await TwoSites.start({ diskBytes: DISK_BYTES, fromDir: `${files.path}/content`, plugin: { syncRateBytesPerSec: 8 * MiB, verify: { rateBytesPerSec: 0 } } })
  for (const { vmId } of VMS) await load(vmId)
  await all.protect()
}, 400_000)

afterAll(async () => {
  await all?.[Symbol.asyncDispose]()
}, 60_000)

const load = async (vmId: number): Promise<void> => {
  const life = lives.get(vmId)! + 1
  lives.set(vmId, life)
  startJournalWriter(all.guest(vmId), DIRS.map((dir) => `${dir}/life-${life}`), { name: `life-${life}` })
  await untilRecord(all.guest(vmId), 10, { name: `life-${life}` })
}

const vm = async (vmId: number): Promise<VmStatus> => (await all.vpg()).vms.find((one) => one.vmId === vmId)!

/** What the last comparison of a VM sent; it ended as one. */
const sentBytes = async (vmId: number): Promise<number> => {
  const { reason } = await vm(vmId)
  expect(reason).toMatch(DELTA_COMPLETE)
  return Number(DELTA_COMPLETE.exec(reason)?.[1])
}

/** A checkpoint taken now is clean, and holds all lives of each guest: those that ended, the present one up to what is durable. */
const recovers = async (tag: string): Promise<void> => {
  const durable = new Map(await Promise.all(VMS.map(async ({ vmId }) => [vmId, await durableRecord(all.guest(vmId), `life-${lives.get(vmId)}`)] as const)))
  const checkpoint = await all.tag(tag)
  using point = await PointImages.copy(all.sites, VPG, checkpoint.id)
  expect(await point.ext4Problems()).toEqual([])
  for (const { vmId } of VMS) {
    for (let life = 1; life <= lives.get(vmId)!; life++) {
      const report = await point.prefix(KEYS.map((key) => ({ vmId, key, folder: `/life-${life}` })))
      expect(report).toMatchObject({ ok: true })
      expect(report.last).toBeGreaterThanOrEqual(life === lives.get(vmId) ? durable.get(vmId)! : 10)
    }
  }
}

const comparing = (vmId: number, doneBytes: number): Promise<unknown> =>
  until(`a comparison of VM ${vmId} is under way`, 60_000, async () => {
    const { sync } = await vm(vmId)
    return (sync?.kind === 'delta' && sync.doneBytes > doneBytes && sync.sentBytes !== undefined) || undefined
  })

test('QEMU killed and started again: a delta sync sends little, and its first checkpoints are the disks', async () => {
  await explained(all, async () => {
    const before = await all.tag('before the power failure')
    let digests: Record<string, string>
    {
      using point = await PointImages.copy(all.sites, VPG, before.id)
      digests = point.digests()
    }
    await all.guest(101).kill()
    await all.boot(101)
    await load(101)
    await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    expect((await all.pluginEvents()).filter((message) => message.startsWith('VM 101 is syncing: ')).at(-1)).toMatch(/^VM 101 is syncing: the VM was started; .*; no bitmap says what changed$/)
    expect(await sentBytes(101)).toBeLessThan(KEYS.length * DISK_BYTES * FAR_BELOW)
    expect((await vm(102)).reason).toBe('initial sync complete')
    expect(await all.differences('after the power failure, at rest')).toEqual([])
    await recovers('after the power failure')
    using again = await PointImages.copy(all.sites, VPG, before.id)
    expect(again.digests()).toEqual(digests)
  })
}, 400_000)

test('the agent killed in the middle of a comparison: the same attach goes on with it', async () => {
  await explained(all, async () => {
    const epochs = async (): Promise<number[]> => (await all.sites.agentStatus()).vpgs[0].vms.map(({ epoch }) => epoch)
    const before = await epochs()
    expect(await all.sites.plugin.api.call(pluginApi.forceSync, { params: { name: VPG }, body: {} })).toEqual({ vmIds: [101, 102] })
    await comparing(102, 4 * MiB)
    await all.sites.agent.kill()
    await all.sites.agent.start()
    await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    for (const { vmId } of VMS) expect(await sentBytes(vmId)).toBeLessThan(KEYS.length * DISK_BYTES * FAR_BELOW)
    expect(await epochs()).toEqual(before)
    expect(await all.differences('after the agent was killed')).toEqual([])
    await recovers('after the agent was killed')
  })
}, 300_000)

test('the plugin killed in the middle of a comparison: it goes on where it was, with the bitmaps', async () => {
  await explained(all, async () => {
    await all.sites.plugin.api.call(pluginApi.forceSync, { params: { name: VPG }, body: { vmId: 101 } })
    await comparing(101, 0)
    await until('its progress is kept', 30_000, async () => readFileSync(globSync(`${all.rootDir}/plugin/**/vm-101.json`)[0], 'utf8').includes('progress') || undefined)
    await all.sites.plugin.kill()
    await all.sites.plugin.start()
    await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    expect((await all.pluginEvents()).filter((message) => message.startsWith('VM 101 is syncing: ')).at(-1)).toBe('VM 101 is syncing: comparison goes on: the plugin was started again')
    await sentBytes(101)
    expect(await all.differences('after the plugin was killed')).toEqual([])
    await recovers('after the plugin was killed')
  })
}, 300_000)

test('a byte rots in a mirror: verify finds it, says so, heals it; the next one finds nothing', async () => {
  await explained(all, async () => {
    const verified = async (count: number): Promise<string> =>
      until('the verify has ended', 120_000, async () => {
        const messages = (await all.pluginEvents()).filter((message) => /^VM 102: (.*bytes differ at|the recovery site holds)/.test(message))
        return messages.length >= count ? messages[count - 1] : undefined
      })
    const verify = () => all.sites.plugin.api.call(pluginApi.verify, { params: { name: VPG }, body: { vmId: 102 } })
    expect(await verify()).toEqual({ vmIds: [102] })
    expect(await verified(1)).toMatch(/^VM 102: the recovery site holds what the source has/)

    const [mirror] = globSync(`${all.rootDir}/agent/vms/*/102/mirror/1.raw`)
    const at = readFileSync(mirror).indexOf(random.subarray(8 * MiB, 8 * MiB + 4096))
    expect(at).toBeGreaterThan(0)
    await using file = await open(mirror, 'r+')
    await file.write(Buffer.of(random[8 * MiB + 100] ^ 4), 0, 1, at + 100)
    await verify()
    const extentAt = at + 100 - ((at + 100) % 65_536)
    // What the guest writes all the time may be undecided: that is said behind it.
    expect(await verified(2)).toContain(`VM 102: 65536 bytes differ at the recovery site: scsi1 at ${extentAt} (65536 bytes); they are synced now`)
    await until('it is healed', PROTECTED_DEADLINE_MS, async () => DELTA_COMPLETE.test((await vm(102)).reason) || undefined)
    expect((await vm(102)).verify?.last).toMatchObject({ differingBytes: 65_536, foundEver: 1 })
    await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    expect(await all.differences('after the byte rotted')).toEqual([])
    await recovers('after the byte rotted')
    await verify()
    expect(await verified(3)).toMatch(/^VM 102: the recovery site holds what the source has/)
    expect((await vm(102)).verify?.last).toMatchObject({ differingBytes: 0, foundEver: 1 })
  })
}, 300_000)
