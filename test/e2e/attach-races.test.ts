import { afterAll, beforeAll, expect, test } from '@jest/globals'
import { pluginApi, type VmStatus } from '../../core/api/index.ts'
import { durableRecord, startJournalWriter, tool, unregisterVm, untilRecord } from '../lab/index.ts'
import { until } from '../lab/sites.ts'
import { PointImages } from './point-images.ts'
import { BOOT_DEADLINE_MS, explained, KEYS, PROTECTED_DEADLINE_MS, TwoSites, VMS, VPG } from './two-sites.ts'

/** A guest that boots begins a new journal; this is the folder of its newest, and the number of its life. */
const lives = new Map(VMS.map(({ vmId }) => [vmId, 0]))
let all: TwoSites

beforeAll(async () => {
  all = await TwoSites.start()
  for (const { vmId } of VMS) await load(vmId)
}, 400_000)

afterAll(async () => {
  await all?.[Symbol.asyncDispose]()
}, 60_000)

const load = async (vmId: number): Promise<void> => {
  const life = lives.get(vmId)! + 1
  lives.set(vmId, life)
  startJournalWriter(all.guest(vmId), KEYS.map((key) => `/mnt/${key}/life-${life}`), { name: `life-${life}` })
  await untilRecord(all.guest(vmId), 10, { name: `life-${life}` })
}

const vm = async (vmId: number): Promise<VmStatus> => (await all.vpg()).vms.find((status) => status.vmId === vmId)!
const untilState = (vmId: number, state: VmStatus['state']): Promise<VmStatus> =>
  until(`VM ${vmId} is ${state}`, PROTECTED_DEADLINE_MS, async () => {
    const status = await vm(vmId)
    return status.state === state ? status : undefined
  }, async () => JSON.stringify(await vm(vmId)))

/** Why the VM's last sync ran, as the operator was told. */
const lastSync = async (vmId: number): Promise<string | undefined> => (await all.pluginEvents()).filter((message) => message.startsWith(`VM ${vmId} is syncing: `)).at(-1)

/** The disks of a VM that is off, and where a snapshot of them lies. */
const disks = (vmId: number): { path: string; snapshot: string }[] => KEYS.map((key) => ({ path: `${all.rootDir}/vm-${vmId}-${key}.raw`, snapshot: `${all.rootDir}/snapshot-${vmId}-${key}.raw` }))
const copy = (from: string, to: string): Promise<unknown> => tool('cp', ['--sparse=always', from, to])

const shows = async ({ id, digests }: { id: string; digests: Record<string, string> }): Promise<void> => {
  using point = await PointImages.copy(all.sites, VPG, id)
  expect(point.digests()).toEqual(digests)
}

/** A checkpoint taken now is clean, and holds all lives of each guest: those that ended whole, the present one up to what is durable. */
const recovers = async (tag: string): Promise<{ id: string; digests: Record<string, string> }> => {
  const durable = new Map(await Promise.all(VMS.map(async ({ vmId }) => [vmId, await durableRecord(all.guest(vmId), `life-${lives.get(vmId)}`)] as const)))
  const { id } = await all.tag(tag)
  using point = await PointImages.copy(all.sites, VPG, id)
  expect(await point.ext4Problems()).toEqual([])
  for (const { vmId } of VMS) {
    for (let life = 1; life <= lives.get(vmId)!; life++) {
      const report = await point.prefix(KEYS.map((key) => ({ vmId, key, folder: `/life-${life}` })))
      expect(report).toMatchObject({ ok: true })
      expect(report.last).toBeGreaterThanOrEqual(life === lives.get(vmId) ? durable.get(vmId)! : 10)
    }
  }
  return { id, digests: point.digests() }
}

test('a group with a VM that is off says so, refuses a tag with the reason, and is protected by itself when the VM starts', async () => {
  await explained(all, async () => {
    await all.guest(102).stop(60_000)
    for (const { path, snapshot } of disks(102)) await copy(path, snapshot)
    await all.sites.createVpg(VPG, VMS.map(({ vmId }) => vmId), 1_000)
    expect(await untilState(101, 'streaming')).toMatchObject({ reason: 'initial sync complete' })
    const vpg = await all.vpg()
    expect(vpg).toMatchObject({ state: 'initializing', reason: 'VM 102 is detached: the VM does not run', rpoMs: null })
    await expect(all.sites.plugin.api.call(pluginApi.tagCheckpoint, { params: { name: VPG }, body: { tag: 'too early' } })).rejects.toMatchObject({
      code: 'CONFLICT', message: expect.stringContaining('VM 102 is detached (the VM does not run)'), hint: expect.any(String),
    })
    expect(await all.sites.checkpoints(VPG)).toEqual([])

    await all.boot(102)
    await load(102)
    await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    expect(await lastSync(102)).toBe('VM 102 is syncing: first copy')
    await recovers('both are on')
  })
}, 300_000)

test('shut down and started again: protected at once if the guest wrote nothing before, the other VM is not touched, older checkpoints keep their bytes', async () => {
  await explained(all, async () => {
    const before = await recovers('before the shutdown')
    const other = await vm(102)
    await all.guest(101).stop(60_000)
    expect(await untilState(101, 'detached')).toMatchObject({ reason: 'the VM does not run' })
    expect(await all.vpg()).toMatchObject({ state: 'degraded', reason: 'VM 101 is detached: the VM does not run' })

    await all.boot(101)
    await load(101)
    await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    const { reason } = await vm(101)
    if (reason.startsWith('delta sync complete')) expect(await lastSync(101)).toMatch(/wrote before capture was attached/)
    else expect([reason, await lastSync(101)]).toEqual(['the VM was stopped and started; nothing was missed, no sync was needed', 'VM 101 is syncing: first copy'])
    expect(await vm(102)).toMatchObject({ state: 'streaming', sinceUnixMs: other.sinceUnixMs })
    await recovers('after the start')
    expect(await all.differences('after the start, at rest')).toEqual([])
    await shows(before)
  })
}, 300_000)

test('QEMU killed under load, started at once and killed in the middle of each attach: protected again by a delta sync', async () => {
  await explained(all, async () => {
    await all.guest(102).kill()
    for (const status of ['created', 'ready', 'standby']) {
      const killed = new AbortController()
      const boot = all.boot(102, {
        signal: killed.signal,
        // The firmware has hardly begun when capture comes.
        onStarted: ({ monitor, pid }) => monitor.onEvent(({ name, data }) => {
          if (name !== 'JOB_STATUS_CHANGE' || data.status !== status || !String(data.id).startsWith('cdp-job-')) return
          process.kill(pid, 'SIGKILL')
          killed.abort()
        }),
      })
      await expect(boot).rejects.toMatchObject({ code: 'ABORTED' })
    }
    await all.boot(102)
    await load(102)
    await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    expect(await vm(102)).toMatchObject({ reason: expect.stringMatching(/^delta sync complete, \d+ bytes sent$/) })
    expect(await lastSync(102)).toMatch(/^VM 102 is syncing: the VM was started; .*; no bitmap says what changed$/)
    await recovers('after the kills')
    expect(await all.differences('after the kills, at rest')).toEqual([])
  })
}, 300_000)

test('a reset of the guest is no event: the jobs survive, the stream goes on', async () => {
  await explained(all, async () => {
    const before = { vms: (await all.vpg()).vms.map(({ state, sinceUnixMs }) => ({ state, sinceUnixMs })), epochs: (await all.sites.agentStatus()).vpgs[0].vms.map(({ epoch }) => epoch) }
    const guest = all.guest(101)
    await guest.vm.monitor.run('system_reset')
    await guest.check('until grep -q /mnt/scsi1 /proc/mounts; do for key in scsi0 scsi1; do mkdir -p /mnt/$key; mount -t ext4 -o noatime /dev/lab/$key /mnt/$key; done; done', { deadlineMs: BOOT_DEADLINE_MS })
    await load(101)
    const after = { vms: (await all.vpg()).vms.map(({ state, sinceUnixMs }) => ({ state, sinceUnixMs })), epochs: (await all.sites.agentStatus()).vpgs[0].vms.map(({ epoch }) => epoch) }
    expect(after).toEqual(before)
    await recovers('after the reset')
    expect(await all.differences('after the reset, at rest')).toEqual([])
  })
}, 300_000)

test('rolled back to an old snapshot while it was off: a delta sync sends what that changed, and what was before stays recoverable', async () => {
  await explained(all, async () => {
    const before = await recovers('before the rollback')
    await all.guest(102).stop(60_000)
    await untilState(102, 'detached')
    for (const { path, snapshot } of disks(102)) await copy(snapshot, path)
    await all.boot(102)
    await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    expect(await vm(102)).toMatchObject({ reason: expect.stringMatching(/^delta sync complete, [1-9]\d* bytes sent$/) })
    expect(await all.guest(102).check('ls -d /mnt/scsi0/life-*')).toBe('/mnt/scsi0/life-1\n')
    expect(await all.differences('after the rollback, at rest')).toEqual([])
    await shows(before)
    // What there was when the guest was off is kept by a name, and is it: both lives, and a file system that was put away.
    const kept = await until('what was before is kept', 60_000, async () => (await all.sites.checkpoints(VPG, 1_000)).find(({ tag = '' }) => tag.startsWith('before VM 102 was started: ')))
    expect(kept.atUnixMs).toBeGreaterThan(Number.parseInt(before.id.split('-')[0], 36))
    using point = await PointImages.copy(all.sites, VPG, kept.id)
    expect(await point.ext4Problems()).toEqual([])
    for (let life = 1; life <= lives.get(102)!; life++) {
      expect(await point.prefix(KEYS.map((key) => ({ vmId: 102, key, folder: `/life-${life}` })))).toMatchObject({ ok: true })
    }
  })
}, 300_000)

test('destroyed at the source: the group says so, and the replica stays, also when protection is ended', async () => {
  await explained(all, async () => {
    const last = await all.tag('before it was destroyed')
    await all.guest(102).stop(60_000)
    const { id, digests } = await (async () => {
      using point = await PointImages.copy(all.sites, VPG, last.id)
      return { id: last.id, digests: point.digests() }
    })()
    unregisterVm(all.rootDir, 102)
    for (const { path } of disks(102)) await tool('rm', [path])
    await until('the group says that a VM is gone', PROTECTED_DEADLINE_MS, async () => {
      const { state, reason } = await all.vpg()
      return (state === 'degraded' && reason.includes('VM 102')) || undefined
    }, async () => JSON.stringify(await all.vpg()))
    await shows({ id, digests })
    await all.sites.plugin.api.call(pluginApi.deleteVpg, { params: { name: VPG } })
    await shows({ id, digests })
  })
}, 300_000)
