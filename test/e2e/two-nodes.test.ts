import { setTimeout as delay } from 'node:timers/promises'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from '@jest/globals'
import { pluginApi, type PluginStatus, type VpgStatus } from '../../core/api/index.ts'
import { nbdUri, startFio, type FioLoad, type FioWrites } from '../integration/bare-load.ts'
import { testSeed } from '../kit/random.ts'
import { makeTempDir, lastingLeaksOf, tool, startVm, type TempDir } from '../lab/index.ts'
import { moveVm, tagAt } from '../lab/cluster.ts'
import { projectDir } from '../lab/project.ts'
import { until, type LabDaemon } from '../lab/sites.ts'
import { Rig, VPG } from '../proof/rig.ts'

// A group whose VMs run on two nodes of one cluster: 101 on pve1, 102 on pve2. Two plugins, one agent; load by fio through QEMU.

const PROTECTED_MS = 60_000
/** What a busy machine of two cores may add to anything. */
const NOISE_MS = 400
const HOLD_MS = 20
const LATE_TIMER_MS = 100

let dir: TempDir
let rig: Rig
let first: LabDaemon
let second: LabDaemon
const seed = testSeed()

beforeAll(async () => {
  await tool(process.execPath, ['scripts/build.mjs'], { cwd: projectDir(), deadlineMs: 120_000 })
  dir = makeTempDir()
  rig = await Rig.start(dir.path, 2)
  console.log(`two nodes: seed ${seed}`)
  ;[first, second] = rig.plugins
}, 180_000)

afterAll(async () => {
  await rig?.[Symbol.asyncDispose]()
  const left = await lastingLeaksOf(dir.path)
  await dir[Symbol.asyncDispose]()
  expect(left).toEqual([])
}, 60_000)

const status = (plugin: LabDaemon): Promise<PluginStatus> => plugin.api.call(pluginApi.status, {})
/** Down on purpose: not started again. */
const down = new Set<LabDaemon>()
beforeEach(() => down.clear())
const group = async (plugin: LabDaemon): Promise<VpgStatus | undefined> => {
  // As systemd does; on a busy machine a watchdog may think that its plugin hangs.
  if (plugin.pid === undefined && !down.has(plugin)) await plugin.start().catch((error: unknown) => console.log(String(error)))
  if (plugin.pid === undefined) return undefined
  return (await status(plugin)).vpgs.find(({ name }) => name === VPG)
}
const untilGroup = (what: string, plugin: LabDaemon, is: (vpg: VpgStatus) => boolean, deadlineMs = PROTECTED_MS): Promise<VpgStatus> =>
  until(what, deadlineMs, async () => {
    const vpg = await group(plugin)
    return vpg !== undefined && is(vpg) ? vpg : undefined
  }, async () => `${JSON.stringify(await group(plugin))}\n${first.log().slice(-2000)}\n${second.log().slice(-2000)}`)
const bothProtected = async (): Promise<void> => {
  await Promise.all([first, second].map((plugin, index) => untilGroup(`pve${index + 1} shows the group as protected`, plugin, ({ state }) => state === 'protected')))
}
const states = (vpg: VpgStatus | undefined): Record<string, string> => Object.fromEntries((vpg?.vms ?? []).map(({ vmId, node, state }) => [`${vmId}@${node}`, state]))
const load = (vmId: number): FioLoad => {
  const disk = rig.disks.find((candidate) => candidate.vmId === vmId)
  if (disk === undefined) throw new Error(`no disk of VM ${vmId}`)
  return startFio(nbdUri(disk.socketPath, disk.key), { sizeBytes: 8 << 20, depth: 4, writesPerSec: 500, seed })
}
const received = async (plugin: LabDaemon, vmId: number): Promise<number> => (await group(plugin))?.vms.find((vm) => vm.vmId === vmId)?.receivedSeq ?? 0
/** Until a VM's load runs. */
const underLoad = async (plugin: LabDaemon, vmId: number): Promise<void> => {
  const before = await received(plugin, vmId)
  await until(`VM ${vmId} writes`, 20_000, async () => ((await received(plugin, vmId)) > before + 200 ? true : undefined))
}
const untilValid = (id: string) => until(`checkpoint ${id} is valid`, 20_000, async () => (await rig.sites.checkpoints(VPG)).find((one) => one.id === id && one.state !== 'pending'))
const show = (what: string, { iops, p99Ms, longestMs }: FioWrites): void => console.log(`${what}: ${Math.round(iops)} IOPS, p99 ${p99Ms.toFixed(1)} ms, longest ${longestMs.toFixed(1)} ms`)

describe('a group over two nodes', () => {
  test('is made on one node, taken up by the other with its pairing, and shown whole by both', async () => {
    await rig.sites.createVpg(VPG, [101, 102], 1000)
    await bothProtected()
    const [one, two] = [await status(first), await status(second)]
    expect([one.node, two.node]).toEqual(['pve1', 'pve2'])
    expect(two.siteId).toBe(one.siteId)
    for (const { vpgs } of [one, two]) expect(states(vpgs[0])).toEqual({ '101@pve1': 'streaming', '102@pve2': 'streaming' })
  }, 90_000)

  test.each([0, 1])('a tag asked of node %d becomes one valid checkpoint in both journals', async (index) => {
    const { checkpointId } = await tagAt(rig.plugins[index], VPG, `from node ${index}`)
    expect(await untilValid(checkpointId)).toMatchObject({ kind: 'tagged', tag: `from node ${index}` })
  }, 60_000)

  test('with a cut each second, writes wait no longer than the hold', async () => {
    await using one = load(101)
    await using two = load(102)
    const before = (await rig.sites.checkpoints(VPG)).length
    const heldMs: number[] = []
    await until('some checkpoints are cut under load', 60_000, async () => {
      for (const plugin of rig.plugins) heldMs.push(...((await group(plugin))?.vms ?? []).map(({ ackLatencyUs }) => (ackLatencyUs.held ?? 0) / 1000))
      return (await rig.sites.checkpoints(VPG)).filter(({ state }) => state !== 'pending').length >= before + 10 ? true : undefined
    })
    console.log(`writes held for a cut: longest ${Math.max(...heldMs).toFixed(1)} ms; abandoned so far ${(await group(first))?.abandonedCuts}`)
    const [ofOne, ofTwo] = [await one.stop(), await two.stop()]
    show('VM 101, cut each second', ofOne)
    show('VM 102, cut each second', ofTwo)
    expect(Math.max(...heldMs)).toBeGreaterThan(0)
    // A timer that runs late on a busy machine is all that may be added to the hold.
    expect(Math.max(...heldMs)).toBeLessThan(HOLD_MS + LATE_TIMER_MS)
    for (const { longestMs } of [ofOne, ofTwo]) expect(longestMs).toBeLessThan(HOLD_MS + NOISE_MS)
  }, 90_000)

  test('a node that stands still costs the others no more than the hold, its cuts are abandoned and counted, and it comes back by itself', async () => {
    await bothProtected()
    const abandonedBefore = (await group(first))?.abandonedCuts ?? 0
    await using one = load(101)
    await underLoad(first, 101)
    down.add(second)
    second.signal('SIGSTOP')
    const unknown = await untilGroup('pve1 does not know what VM 102 does', first, ({ vms }) => vms.some(({ vmId, state }) => vmId === 102 && state === 'unknown'), 10_000)
    expect(unknown.state).toBe('degraded')
    expect(unknown.vms.find(({ vmId }) => vmId === 102)?.reason).toMatch(/^node pve2 (has not answered|cannot be reached)/)
    await untilGroup('abandoned cuts are counted, and the RPO grows', first, ({ abandonedCuts, rpoMs }) => abandonedCuts >= abandonedBefore + 3 && (rpoMs ?? 0) > 1_500, 15_000)
    await expect(tagAt(first, VPG, 'cannot be')).rejects.toMatchObject({ code: 'CONFLICT', message: expect.stringContaining('node pve2') })
    const writes = await one.stop()
    show('VM 101, the other node stands still', writes)
    expect(writes.longestMs).toBeLessThan(HOLD_MS + NOISE_MS)
    // Its watchdog has ended it, so that VM 102 goes on; what starts it again is systemd.
    expect(await second.ended(10_000)).toBe(true)
    down.clear()
    await bothProtected()
  }, 120_000)

  test('a node killed in the middle of cuts: the same', async () => {
    const abandonedBefore = (await group(first))?.abandonedCuts ?? 0
    await using one = load(101)
    await using two = load(102)
    await Promise.all([underLoad(first, 101), underLoad(second, 102)])
    const cuts = Promise.allSettled(Array.from({ length: 20 }, () => tagAt(first, VPG, 'storm')))
    await delay(100)
    down.add(second)
    await second.kill()
    await cuts
    await untilGroup('abandoned cuts are counted', first, ({ abandonedCuts }) => abandonedCuts > abandonedBefore, 15_000)
    const [ofOne, ofTwo] = [await one.stop(), await two.stop()]
    show('VM 101, the other node was killed', ofOne)
    show('VM 102, its own plugin was killed', ofTwo)
    expect(ofOne.longestMs).toBeLessThan(HOLD_MS + NOISE_MS)
    down.clear()
    await bothProtected()
    const { checkpointId } = await tagAt(second, VPG, 'after the kill')
    await untilValid(checkpointId)
  }, 120_000)

  test('the coordinator killed: the other shows it, and everything goes on when it is back', async () => {
    down.add(first)
    await first.kill()
    const alone = await untilGroup('pve2 does not know what VM 101 does', second, ({ vms }) => vms.some(({ vmId, state }) => vmId === 101 && state === 'unknown'), 10_000)
    expect(alone.state).toBe('degraded')
    await expect(tagAt(second, VPG, 'cannot be')).rejects.toMatchObject({ code: 'UNREACHABLE' })
    down.clear()
    await bothProtected()
  }, 120_000)

  test('a VM that moves to the other node is protected there, and back: one node cuts alone, then both again', async () => {
    const [pve1, pve2] = [rig.rootDir, second.rootDir]
    const disks = rig.disks.filter(({ vmId }) => vmId === 102).map(({ key }) => ({ key, path: `${rig.rootDir}/102-${key}.raw`, format: 'raw' as const, shareRw: true }))
    const start = (rootDir: string, nodeName: string) => startVm({ rootDir, nodeName, vmId: 102, shape: '8.4', disks, memoryMiB: 64, nbdServerPath: `${rig.rootDir}/door102`, frozen: true })
    await rig.vms[1].kill()
    moveVm(pve2, pve1, 102, 'pve1')
    {
      await using moved = await start(pve1, 'pve1')
      for (const plugin of [first, second]) await untilGroup('VM 102 is protected on pve1', plugin, (vpg) => states(vpg)['102@pve1'] === 'streaming' && vpg.state === 'protected')
      await untilValid((await tagAt(second, VPG, 'on one node')).checkpointId)
      await moved.kill()
    }
    moveVm(pve1, pve2, 102, 'pve2')
    await using back = await start(pve2, 'pve2')
    for (const plugin of rig.plugins) await untilGroup('VM 102 is protected on pve2', plugin, (vpg) => states(vpg)['102@pve2'] === 'streaming' && vpg.state === 'protected')
    await untilValid((await tagAt(first, VPG, 'on both again')).checkpointId)
    await back.kill()
  }, 180_000)

  test('deleted on one node, it is gone from both', async () => {
    await second.api.call(pluginApi.deleteVpg, { params: { name: VPG } })
    await until('pve1 has let go of the group', 15_000, async () => ((await group(first)) === undefined ? true : undefined))
    expect((await status(second)).vpgs).toEqual([])
  }, 60_000)
})
