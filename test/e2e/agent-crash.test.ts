import { afterAll, beforeAll, expect, test } from '@jest/globals'
import { randomFillSync } from 'node:crypto'
import { globSync, mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { pluginApi, type AgentVpg, type VmStatus } from '../../core/api/index.ts'
import { Random, testSeed } from '../kit/random.ts'
import { durableRecord, makeTempDir, startJournalWriter, untilRecord } from '../lab/index.ts'
import { until } from '../lab/sites.ts'
import { checkJournal } from './journal-check.ts'
import { PointImages } from './point-images.ts'
import { qemuState, type QemuState } from './qemu-state.ts'
import { atRandom, DIRS, explained, GapMeters, KEYS, PROTECTED_DEADLINE_MS, TwoSites, VMS, VPG } from './two-sites.ts'

const ROUNDS = process.env.CDP_ALL ? 20 : 3
/** Nothing that happens at the recovery site is the guests' business. */
const LONGEST_GAP_MS = 2_000
const MiB = 1 << 20

const random = new Random(testSeed())
let all: TwoSites
let meters: GapMeters
let files: ReturnType<typeof makeTempDir>
let untouched: QemuState[]

beforeAll(async () => {
  console.log(`seed ${random.seed}`)
  files = makeTempDir()
  mkdirSync(`${files.path}/content`)
  writeFileSync(`${files.path}/content/random`, randomFillSync(Buffer.alloc(16 * MiB)))
  all = await TwoSites.start({ fromDir: `${files.path}/content`, plugin: { memoryBytesPerVm: 32 * MiB, syncRateBytesPerSec: 16 * MiB, spill: { directory: `${files.path}/spill`, bytesPerVm: 48 * MiB, reserveBytes: 0 } }, agent: { segmentBytes: 4 * MiB } })
  untouched = await Promise.all(all.guests.map(({ vm }) => qemuState(vm)))
  for (const guest of all.guests) startJournalWriter(guest, DIRS)
  await Promise.all(all.guests.map((guest) => untilRecord(guest, 10)))
  meters = new GapMeters(all.guests)
}, 400_000)

afterAll(async () => {
  await all?.[Symbol.asyncDispose]()
  await files?.[Symbol.asyncDispose]()
}, 60_000)

const withGap = async (what: string, work: () => Promise<void>): Promise<void> => {
  await meters.start()
  await work()
  const { writes } = await meters.look()
  const gap = await meters.untilWrites(writes, 10)
  await meters.stop()
  console.log(`${what}: longest gap ${gap.longestGapMs} ms in ${gap.writes} writes`)
  expect(gap.failed).toBe(0)
  expect(gap.longestGapMs).toBeLessThan(LONGEST_GAP_MS)
}

const onAgent = async (): Promise<AgentVpg> => (await all.sites.agentStatus()).vpgs.find(({ name }) => name === VPG)!
const epochsOf = async (): Promise<number[]> => (await onAgent()).vms.map(({ epoch }) => epoch)
const onPlugin = async (): Promise<VmStatus[]> => (await all.vpg()).vms
const directoryOf = (vmId: number): string => globSync(`${all.rootDir}/agent/vms/*/${vmId}`)[0]

/** A checkpoint that was cut after now is valid: everything from before has arrived. */
const FULL = 'the link is down and the memory is full; spill: the spill has reached its limit'
const untilFresh = async (): Promise<void> => {
  const nowUnixMs = Date.now()
  await until('a checkpoint that is younger', PROTECTED_DEADLINE_MS, async () => (await all.sites.checkpoints(VPG, 5)).some(({ atUnixMs, state }) => atUnixMs > nowUnixMs && (state === 'valid' || state === 'proved')) || undefined)
}

const durableInGuests = async (): Promise<Map<number, number>> => new Map(await Promise.all(all.guests.map(async (guest) => [guest.vm.vmId, await durableRecord(guest)] as const)))

const expectWhole = async (point: PointImages, durable: Map<number, number>): Promise<void> => {
  expect(await point.ext4Problems()).toEqual([])
  for (const { vmId } of VMS) {
    const report = await point.prefix(KEYS.map((key) => ({ vmId, key })))
    expect(report).toMatchObject({ ok: true })
    expect(report.last).toBeGreaterThanOrEqual(durable.get(vmId)!)
  }
}

const recovers = async (tag: string): Promise<void> => {
  const durable = await durableInGuests()
  const checkpoint = await all.tag(tag)
  using point = await PointImages.copy(all.sites, VPG, checkpoint.id)
  await expectWhole(point, durable)
}

test('killed in the first copy: the copy goes on over the same attach, and the first checkpoint is whole', async () => {
  await explained(all, async () => {
    await all.sites.createVpg(VPG, VMS.map(({ vmId }) => vmId), 1_000)
    for (const part of [0.1, 0.5]) {
      await until('the first copies are under way', 60_000, async () => (await onPlugin()).every(({ sync, state }) => state === 'streaming' || (sync !== undefined && sync.doneBytes > sync.totalBytes * part)) || undefined)
      await withGap(`kill -9 of the agent in the first copy, from ${part * 100} % on`, async () => {
        await atRandom(random, 0, 300)
        await all.sites.agent.kill()
        await all.sites.agent.start()
      })
    }
    await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    expect((await onPlugin()).map(({ reason }) => reason)).toEqual(['initial sync complete', 'initial sync complete'])
    expect(await epochsOf()).toEqual([1, 1])
    expect(await all.differences('the first copy, at rest')).toEqual([])
  })
}, 300_000)

test(`killed ${ROUNDS} times under load: no acknowledged record is lost, none comes twice, the order holds, and the same attach goes on`, async () => {
  await explained(all, async () => {
    const epochs = await epochsOf()
    const since = (await onPlugin()).map(({ sinceUnixMs }) => sinceUnixMs)
    for (let round = 1; round <= ROUNDS; round++) {
      await withGap(`kill -9 of the agent, round ${round}`, async () => {
        await atRandom(random, 0, 2_000)
        const acknowledged = await onPlugin()
        await all.sites.agent.kill()
        for (const { vmId, durableSeq } of acknowledged) {
          const report = await checkJournal(directoryOf(vmId), String(vmId), all.rootDir)
          expect(report.problems).toEqual([])
          expect(report.durableSeq).toBeGreaterThanOrEqual(durableSeq)
          expect(report.frames).toBeGreaterThan(0)
        }
        await all.sites.agent.start()
      })
      await untilFresh()
      expect(await epochsOf()).toEqual(epochs)
      expect((await onPlugin()).map(({ state, sinceUnixMs }) => ({ state, sinceUnixMs }))).toEqual(since.map((sinceUnixMs) => ({ state: 'streaming', sinceUnixMs })))
    }
    await recovers('after the kills')
    expect(await all.differences('after the kills, at rest')).toEqual([])
  })
}, 400_000)

test('away for longer than memory and spill last: checkpoints go on into the files until they are full, then capture lets go with its reason; the guest does not notice, all that was captured arrives, a bitmap sync follows, older checkpoints keep their bytes', async () => {
  await explained(all, async () => {
    const durable = await durableInGuests()
    const old = await all.tag('before the long absence')
    let digests: Record<string, string>
    let cutWhileAway = { id: '', durable }
    {
      using point = await PointImages.copy(all.sites, VPG, old.id)
      await expectWhole(point, durable)
      digests = point.digests()
    }
    const epochs = await epochsOf()
    await withGap('the agent is away, 101 writes more than memory holds', async () => {
      await all.sites.agent.kill()
      const busy = all.guest(101)
      const spilling = await durableInGuests()
      const { checkpointId } = await all.sites.plugin.api.call(pluginApi.tagCheckpoint, { params: { name: VPG }, body: { tag: 'into the files' } })
      cutWhileAway = { id: checkpointId, durable: spilling }
      const heavy = busy.start('while :; do dd if=/mnt/scsi0/random of=/mnt/scsi1/copy bs=1M conv=fsync 2>/dev/null; done')
      await until('capture lets go of VM 101', 120_000, async () => (await all.pluginEvents()).some((message) => message.startsWith(`VM 101 is tracking: ${FULL}`)) || undefined)
      expect((await onPlugin())[0].spilledBytes).toBeGreaterThan(32 * MiB)
      const vpg = await all.vpg()
      expect(vpg.state).toBe('degraded')
      expect(vpg.reason).toMatch(/^VM 101 is /)
      expect(vpg.vms[1].state).toBe('streaming')
      // Goes on for a while: what only the bitmap knows of.
      await busy.check('dd if=/dev/zero of=/mnt/scsi0/only-in-the-bitmap bs=1M count=4 conv=fsync 2>/dev/null', { deadlineMs: 60_000 })
      await busy.end(heavy, 'KILL')
      await all.sites.agent.start()
    })
    await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    await untilFresh()
    const [first, second] = await onPlugin()
    expect(first.reason).toBe('bitmap sync complete')
    expect((await all.pluginEvents()).filter((message) => message.startsWith('VM 101 is syncing: ')).at(-1)).toContain(`VM 101 is syncing: ${FULL}`)
    expect(second.state).toBe('streaming')
    expect((await epochsOf())[0]).toBeGreaterThan(epochs[0])
    expect((await epochsOf())[1]).toBe(epochs[1])
    // Cut while nobody was there to take it: it came with the files, before the sync.
    expect((await all.sites.checkpoints(VPG, 1_000)).find(({ id }) => id === cutWhileAway.id)).toMatchObject({ state: expect.stringMatching(/valid|proved/) })
    {
      using point = await PointImages.copy(all.sites, VPG, cutWhileAway.id)
      await expectWhole(point, cutWhileAway.durable)
    }
    await recovers('after the long absence')
    expect(await all.differences('after the long absence, at rest')).toEqual([])
    using again = await PointImages.copy(all.sites, VPG, old.id)
    expect(again.digests()).toEqual(digests)
  })
}, 400_000)

test('stopped by SIGSTOP: the plugin notices a peer that is silent, shows a group that is late, and goes on with the same attach', async () => {
  await explained(all, async () => {
    const epochs = await epochsOf()
    await withGap('SIGSTOP of the agent', async () => {
      const silent = /the agent has been silent for \d+ s/g
      const before = all.sites.plugin.log().match(silent)?.length ?? 0
      all.sites.agent.signal('SIGSTOP')
      try {
        const late = await until('the group is late', 30_000, async () => {
          const vpg = await all.vpg()
          return vpg.state === 'degraded' ? vpg : undefined
        })
        expect(late.reason).toMatch(/^the newest valid checkpoint is \d+ s old$/)
        await until('both streams are given up', 60_000, async () => (all.sites.plugin.log().match(silent)?.length ?? 0) >= before + VMS.length || undefined)
      } finally {
        all.sites.agent.signal('SIGCONT')
      }
    })
    await untilFresh()
    await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    expect(await epochsOf()).toEqual(epochs)
    await recovers('after SIGSTOP')
  })
}, 200_000)

test('the catalogue is lost while the protected site is away: the journals give the same list again, and its points open', async () => {
  await explained(all, async () => {
    await all.sites.plugin.stop()
    const before = await all.sites.checkpoints(VPG)
    const known = await onAgent()
    await all.sites.agent.stop()
    const files = globSync(`${all.rootDir}/agent/catalogue.sqlite*`)
    expect(files.length).toBeGreaterThan(0)
    for (const file of files) rmSync(file)
    await all.sites.agent.start()
    expect(await all.sites.checkpoints(VPG)).toEqual(before)
    expect(await onAgent()).toMatchObject({ name: VPG, checkpoints: known.checkpoints, lastValidCheckpoint: known.lastValidCheckpoint, vms: known.vms })
    const tagged = before.find(({ tag }) => tag === 'after SIGSTOP')!
    using point = await PointImages.copy(all.sites, VPG, tagged.id)
    expect(await point.ext4Problems()).toEqual([])

    for (const { vmId } of VMS) expect((await checkJournal(directoryOf(vmId), String(vmId), all.rootDir)).problems).toEqual([])
    await all.sites.plugin.start()
    await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    await recovers('with the new catalogue')
  })
}, 200_000)

test('both sites die at once and the plugin comes back first: the bitmaps wait for the agent, nothing is forgotten', async () => {
  await explained(all, async () => {
    await withGap('both killed', async () => {
      await Promise.all([all.sites.plugin.kill(), all.sites.agent.kill()])
      await all.sites.plugin.start()
      await until('both VMs are tracked', 60_000, async () => (await onPlugin()).every(({ state }) => state === 'tracking') || undefined)
      expect((await all.vpg()).reason).toMatch(/cannot be reached/)
      for (const guest of all.guests) await guest.check('dd if=/mnt/scsi0/random of=/mnt/scsi1/while-both-were-away bs=1M count=4 conv=fsync 2>/dev/null', { deadlineMs: 60_000 })
      await all.sites.agent.start()
    })
    await all.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    expect((await onPlugin()).map(({ reason }) => reason)).toEqual(['bitmap sync complete', 'bitmap sync complete'])
    for (const { vmId } of VMS) expect((await all.pluginEvents()).filter((message) => message.startsWith(`VM ${vmId} is syncing: `)).at(-1)).toMatch(/: the plugin was started again$/)
    expect(await all.differences('after both died, at rest')).toEqual([])
  })
}, 200_000)

test('protection is ended while the agent is away: in bounded time, and nothing of ours stays in QEMU', async () => {
  await explained(all, async () => {
    await all.sites.agent.kill()
    const beganMs = performance.now()
    await withGap('the VPG is deleted, no agent', async () => {
      await all.sites.plugin.api.call(pluginApi.deleteVpg, { params: { name: VPG } })
    })
    expect(performance.now() - beganMs).toBeLessThan(30_000)
    expect(await Promise.all(all.guests.map(({ vm }) => qemuState(vm)))).toEqual(untouched)
    await all.sites.agent.start()
    expect((await all.sites.checkpoints(VPG)).length).toBeGreaterThan(0)
  })
}, 120_000)
