import { afterAll, beforeAll, expect, test } from '@jest/globals'
import { randomFillSync } from 'node:crypto'
import { existsSync, mkdirSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { pluginApi } from '../../core/api/index.ts'
import { Random, testSeed } from '../kit/random.ts'
import { durableRecord, makeTempDir, processesWith, startJournalWriter, untilRecord, withDeadline } from '../lab/index.ts'
import { until } from '../lab/sites.ts'
import { hangWorker } from './hang-worker.ts'
import { PointImages } from './point-images.ts'
import { qemuState, withoutBitmaps, type QemuState } from './qemu-state.ts'
import { atRandom, DIRS, explained, GapMeters, KEYS, PROTECTED_DEADLINE_MS, TwoSites, VMS, VPG } from './two-sites.ts'

const ROUNDS = process.env.CDP_ALL ? 15 : 3
const SYNC_ROUNDS = process.env.CDP_ALL ? 6 : 2
/** The bound of the product: a guest goes on within this, whatever happens to the plugin. */
const LONGEST_GAP_MS = 2_000
const MiB = 1 << 20

const random = new Random(testSeed())
let all: TwoSites
let meters: GapMeters
let untouched: QemuState[]
const pluginPids: number[] = []

beforeAll(async () => {
  console.log(`seed ${random.seed}`)
  await using files = makeTempDir()
  mkdirSync(`${files.path}/content`)
  writeFileSync(`${files.path}/content/random`, randomFillSync(Buffer.alloc(16 * MiB)))
  // A first copy takes some seconds at this rate: long enough to be met in the middle.
  all = await TwoSites.start({ fromDir: `${files.path}/content`, plugin: { syncRateBytesPerSec: 12 * MiB }, pluginNodeArgs: ['--inspect=127.0.0.1:0'] })
  untouched = await Promise.all(all.guests.map(({ vm }) => qemuState(vm)))
  for (const guest of all.guests) startJournalWriter(guest, DIRS)
  await Promise.all(all.guests.map((guest) => untilRecord(guest, 10)))
  meters = new GapMeters(all.guests)
}, 400_000)

afterAll(async () => {
  await all?.[Symbol.asyncDispose]()
  // The name of a watchdog's program is all that its command line has in common with the site; its plugins are gone.
  await until('no watchdog outlives its plugin', 5_000, async () => pluginPids.every((pid) => processesWith(`watchdog.js ${pid} `).length === 0) || undefined)
}, 60_000)

/** Measures the guests' I/O around what is done to the plugin, and until they have written on after it. */
const withGap = async (what: string, work: () => Promise<void>): Promise<void> => {
  await meters.start()
  await work()
  const { writes } = await meters.look()
  const gap = await meters.untilWrites(writes, 10)
  await meters.stop()
  console.log(`${what}: longest gap ${gap.longestGapMs} ms in ${gap.writes} writes`)
  expect(gap.failed).toBe(0)
  expect(gap.longestGapMs).toBeLessThan(LONGEST_GAP_MS)
  expect(all.guests.map(({ vm }) => vm.running)).toEqual([true, true])
}

/** SIGKILL (or SIGSTOP) in the moment in which QEMU tells of a job of ours in that state, until the plugin has ended. It may be starting or running. */
const endAtJobState = async (signal: 'SIGKILL' | 'SIGSTOP', vmId: number, status: string, during: () => Promise<unknown>): Promise<void> => {
  const { promise, resolve } = Promise.withResolvers<void>()
  const stop = all.guest(vmId).vm.monitor.onEvent(({ name, data }) => {
    if (name !== 'JOB_STATUS_CHANGE' || data.status !== status || !String(data.id).startsWith('cdp-job-')) return
    all.sites.plugin.signal(signal)
    resolve()
  })
  try {
    const outcome = during().catch(() => undefined) // killed before it answered
    await withDeadline(promise, 60_000, `a job of VM ${vmId} becomes ${status}`)
    await outcome
    expect(await all.sites.plugin.ended(10_000)).toBe(true)
  } finally {
    stop()
  }
}

/** Started again by somebody, as systemd would: it comes back by itself, and says by which sync and why. */
const comesBack = async (kind: 'initial' | 'bitmap', why: RegExp): Promise<void> => {
  if (all.sites.plugin.pid === undefined) await all.sites.plugin.start()
  pluginPids.push(all.sites.plugin.pid!)
  const vpg = await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
  expect(vpg.vms.map(({ reason }) => reason)).toEqual([`${kind} sync complete`, `${kind} sync complete`])
  const told = await all.pluginEvents()
  for (const { vmId } of VMS) expect(told.filter((message) => message.startsWith(`VM ${vmId} is syncing: `)).at(-1)).toMatch(why)
}

/** A checkpoint taken now recovers to clean file systems and to everything that was durable. */
const recovers = async (tag: string): Promise<void> => {
  const durable = new Map(await Promise.all(all.guests.map(async (guest) => [guest.vm.vmId, await durableRecord(guest)] as const)))
  const checkpoint = await all.tag(tag)
  using point = await PointImages.copy(all.sites, VPG, checkpoint.id)
  expect(await point.ext4Problems()).toEqual([])
  for (const { vmId } of VMS) {
    const report = await point.prefix(KEYS.map((key) => ({ vmId, key })))
    expect(report).toMatchObject({ ok: true })
    expect(report.last).toBeGreaterThanOrEqual(durable.get(vmId)!)
  }
}

/** Every job that has lost its target stands still: the guests write past it. */
const jobsStandStill = async (): Promise<boolean> =>
  (await Promise.all(all.guests.map(async ({ vm }) => (await vm.monitor.run('query-block-jobs')) as { 'io-status': string }[]))).flat().every((job) => job['io-status'] !== 'ok')


test('killed at attach, in the first copy, and with the shield half built: the guests go on, the copy goes on where it was', async () => {
  await explained(all, async () => {
    await withGap('kill -9 when the first job was made', () => endAtJobState('SIGKILL', 101, 'created', () => all.sites.createVpg(VPG, VMS.map(({ vmId }) => vmId), 1_000)))
    await withGap('kill -9 in the first copy', async () => {
      await all.sites.plugin.start()
      await until('both first copies are under way', 60_000, async () => (await all.vpg()).vms.every(({ sync }) => sync?.kind === 'initial' && sync.doneBytes > 0) || undefined)
      await atRandom(random, 0, 1_500)
      await all.sites.plugin.kill()
    })
    await withGap('kill -9 while the job of the 8.4 guest is paused for its shield', () => endAtJobState('SIGKILL', 102, 'standby', () => all.sites.plugin.start()))
    await comesBack('initial', /^VM \d+ is syncing: first copy goes on: /)
    await recovers('after the first copy')
    expect(await all.differences('after the first copy, at rest')).toEqual([])
  })
}, 300_000)

test(`killed ${ROUNDS} times while streaming: the guests' I/O never stops, and a bitmap sync brings the group back`, async () => {
  await explained(all, async () => {
    for (let round = 1; round <= ROUNDS; round++) {
      await withGap(`kill -9 while streaming, round ${round}`, async () => {
        await atRandom(random, 0, 1_500)
        await all.sites.plugin.kill()
        await until('QEMU stops its jobs', 10_000, async () => (await jobsStandStill()) || undefined)
      })
      await comesBack('bitmap', /^VM \d+ is syncing: the plugin was started again$/)
      if (round === 1 || round === ROUNDS) await recovers(`after kill ${round}`)
    }
  })
}, 400_000)

test('killed in the middle of a bitmap sync, again and again: the rotated bitmaps become one, and nothing is forgotten', async () => {
  await explained(all, async () => {
    await all.sites.plugin.kill()
    const syncing = [101, 102].map((vmId) => async () => ((await all.vpg()).vms.find((vm) => vm.vmId === vmId)?.sync?.doneBytes ?? 0) > 0 || undefined)
    for (let round = 1; round <= SYNC_ROUNDS; round++) {
      await withGap(`kill -9 in a bitmap sync, round ${round}`, async () => {
        for (const guest of all.guests) await guest.check(`dd if=/mnt/scsi0/random of=/mnt/scsi1/missed-${round % 2} bs=1M skip=${round % 4} count=12 conv=fsync 2>/dev/null`, { deadlineMs: 60_000 })
        await all.sites.plugin.start()
        await until('a bitmap sync is under way', 60_000, syncing[round % 2])
        await atRandom(random, 0, 700)
        await all.sites.plugin.kill()
      })
    }
    await comesBack('bitmap', /^VM \d+ is syncing: the plugin was started again$/)
    expect(await all.differences('after kills in bitmap syncs')).toEqual([])
    await recovers('after kills in bitmap syncs')
  })
}, 300_000)

test('stopped by SIGSTOP: the watchdog ends it, the guests go on within 2 s', async () => {
  await explained(all, async () => {
    await withGap('SIGSTOP', async () => {
      all.sites.plugin.signal('SIGSTOP')
      expect(await all.sites.plugin.ended(10_000)).toBe(true)
    })
    expect(all.sites.plugin.log()).toContain('gave no sign of life')
    for (const [vmId, status] of [[101, 'created'], [102, 'standby']] as const) {
      await withGap(`SIGSTOP while a job of VM ${vmId} is ${status}`, () => endAtJobState('SIGSTOP', vmId, status, () => all.sites.plugin.start()))
    }
    await comesBack('bitmap', /^VM \d+ is syncing: the plugin was started again$/)
    await recovers('after SIGSTOP')
    expect(await all.differences('after SIGSTOP, at rest')).toEqual([])
  })
}, 200_000)

test('a watchdog that was held up itself does not take the plugin for hung; one that died is started again, and watches', async () => {
  await explained(all, async () => {
    const { pid } = all.sites.plugin
    const watchdogs = (): number[] => processesWith(`watchdog.js ${pid} `).map((found) => found.pid)
    const [first] = watchdogs()
    process.kill(first, 'SIGSTOP')
    await delay(2_500) // longer than it waits for a sign of life: there is no event in that
    process.kill(first, 'SIGCONT')
    expect(await all.sites.plugin.ended(1_000)).toBe(false)
    process.kill(first, 'SIGKILL')
    await until('another watchdog', 20_000, async () => watchdogs().some((found) => found !== first) || undefined)
    await withGap('SIGSTOP under the second watchdog', async () => {
      all.sites.plugin.signal('SIGSTOP')
      expect(await all.sites.plugin.ended(10_000)).toBe(true)
    })
    await comesBack('bitmap', /^VM \d+ is syncing: the plugin was started again$/)
  })
}, 120_000)

test('a capture worker that hangs is ended: its guest goes on within 2 s, the other one is not touched, capture comes back', async () => {
  await explained(all, async () => {
    const { pid } = all.sites.plugin
    const epochs = async (): Promise<number[]> => (await all.sites.agentStatus()).vpgs[0].vms.map(({ epoch }) => epoch)
    const before = await epochs()
    await withGap('a hung worker of VM 101', async () => {
      await hangWorker(all.sites.plugin, 'capture-101')
      await until('the worker is ended', 10_000, async () => (await all.pluginEvents()).some((message) => message.includes('VM 101 is tracking: the capture worker ended: it did not answer')) || undefined)
    })
    const vpg = await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    expect(vpg.vms[0].reason).toBe('bitmap sync complete')
    expect((await all.pluginEvents()).filter((message) => message.startsWith('VM 101 is syncing: ')).at(-1)).toMatch(/the capture worker ended: it did not answer/)
    expect(all.sites.plugin.pid).toBe(pid)
    expect(await epochs()).toEqual([before[0] + 1, before[1]])
    await recovers('after the hung worker')
    expect(await all.differences('after the hung worker, at rest')).toEqual([])
  })
}, 200_000)

test('a clean stop leaves nothing of ours in QEMU but dirty bitmaps; the end of protection leaves nothing at all', async () => {
  await explained(all, async () => {
    await withGap('SIGTERM', () => all.sites.plugin.stop())
    const stopped = await Promise.all(all.guests.map(({ vm }) => qemuState(vm)))
    expect(stopped.map(withoutBitmaps)).toEqual(untouched)
    for (const { bitmaps } of stopped) {
      expect(bitmaps).toHaveLength(KEYS.length)
      for (const bitmap of bitmaps) expect(bitmap).toMatch(/ cdp-bitmap-\d+ recording$/)
    }
    await comesBack('bitmap', /^VM \d+ is syncing: the plugin was started again$/)
    await recovers('after the stop')

    await withGap('the VPG is deleted', async () => {
      await all.sites.plugin.api.call(pluginApi.deleteVpg, { params: { name: VPG } })
    })
    expect(await Promise.all(all.guests.map(({ vm }) => qemuState(vm)))).toEqual(untouched)
    expect((await all.sites.pluginStatus()).vpgs).toEqual([])
    for (const { vmId } of VMS) for (const name of [`capture-${vmId}.sock`, `read-${vmId}.sock`]) expect(existsSync(`${all.rootDir}/run/${name}`)).toBe(false)
  })
}, 200_000)
