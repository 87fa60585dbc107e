import { cpSync, renameSync, rmSync } from 'node:fs'
import { afterAll, beforeAll, expect, test } from '@jest/globals'
import { DiskRig, VPG } from '../faults/disk-rig.ts'
import { Random, testSeed } from '../kit/random.ts'

// The recovery site is put back to an older state of its own, as from a backup, while QEMU's dirty bitmaps speak of the newer one.

const MiB = 1 << 20
const DEADLINE_MS = 60_000
const random = new Random(testSeed())
let rig: DiskRig

beforeAll(async () => {
  console.log(`seed ${random.seed}`)
  rig = await DiskRig.start({ diskBytes: 32 * MiB })
  await rig.protect()
}, 120_000)

afterAll(async () => rig?.[Symbol.asyncDispose](), 60_000)

const write = async (count: number): Promise<void> => {
  for (let n = 0; n < count; n++) await rig.client.write(random.int(0, 32 * 16) * 64 * 1024, Buffer.alloc(64 * 1024, random.int(1, 255)))
}
/** The reason of the VM's last sync, as the operator was told. */
const lastSync = async (): Promise<string | undefined> => (await rig.events()).filter((message) => message.startsWith('VM 101 is syncing: ')).at(-1)
const restartPlugin = async (): Promise<void> => {
  await rig.sites.plugin.kill()
  await rig.sites.plugin.start()
}

test('everything is compared, whatever the bitmaps say, and checkpoints are whole again', async () => {
  const { agent, plugin } = rig.sites
  const state = `${agent.rootDir}/agent`
  await write(20)
  const before = await rig.snapshot()
  await rig.untilValid(before.checkpointId, DEADLINE_MS)
  await agent.stop()
  cpSync(state, `${state}.backup`, { recursive: true, preserveTimestamps: true })
  await agent.start()
  await rig.sites.untilProtected(VPG, DEADLINE_MS)

  // All of this is durable at the recovery site, and what a bitmap sync has copied no bitmap names any more.
  await write(60)
  await restartPlugin()
  await rig.sites.untilProtected(VPG, DEADLINE_MS)
  expect(await lastSync()).toBe('VM 101 is syncing: the plugin was started again')
  const lost = await rig.snapshot()
  await rig.untilValid(lost.checkpointId, DEADLINE_MS)

  await Promise.all([agent.stop(), plugin.kill()])
  renameSync(state, `${state}.gone`)
  renameSync(`${state}.backup`, state)
  await agent.start()
  await plugin.start()
  await rig.sites.untilProtected(VPG, DEADLINE_MS)
  expect(await lastSync()).toBe('VM 101 is syncing: the recovery site lost data that it had acknowledged')
  const after = await rig.snapshot()
  await rig.untilValid(after.checkpointId, DEADLINE_MS)
  expect(after.sha256).toBe(lost.sha256)
  expect(await rig.sha256Of(after.checkpointId)).toBe(after.sha256)
  expect(await rig.sha256Of(before.checkpointId)).toBe(before.sha256)
  rmSync(`${state}.gone`, { recursive: true })

  // From then on bitmaps count again.
  await write(5)
  await restartPlugin()
  await rig.sites.untilProtected(VPG, DEADLINE_MS)
  expect(await lastSync()).toBe('VM 101 is syncing: the plugin was started again')
  const last = await rig.snapshot()
  await rig.untilValid(last.checkpointId, DEADLINE_MS)
  expect(await rig.sha256Of(last.checkpointId)).toBe(last.sha256)
}, 300_000)
