import { afterAll, beforeAll, expect, test } from '@jest/globals'
import { Random, testSeed } from '../kit/random.ts'
import { DiskRig, type Snapshot } from '../faults/disk-rig.ts'
import { runTool } from '../lab/index.ts'
import { until } from '../lab/sites.ts'

// A poor line: 1 Mbit/s, 300 ms there and back, 2 % of packets lost.

const MiB = 1 << 20
const MEMORY_BYTES = 16 * MiB
const LATE_MS = 240_000
/** Silence after which the protected site gives the other one up. */
const SILENCE_MS = 15_000

const random = new Random(testSeed())
let rig: DiskRig

beforeAll(async () => {
  console.log(`seed ${random.seed}`)
  rig = await DiskRig.start({ diskBytes: 64 * MiB, spillBytes: 256 * MiB, link: { delayMs: 150 }, plugin: { memoryBytesPerVm: MEMORY_BYTES } })
  await rig.protect(2_000, 120_000)
  await degrade()
}, 300_000)

afterAll(async () => rig?.[Symbol.asyncDispose](), 60_000)

const degrade = async (): Promise<void> => {
  await rig.link.slow(1_000_000)
  await rig.link.lose(0.02)
}

const noise = (lengthBytes: number): Buffer => {
  const bytes = Buffer.alloc(lengthBytes)
  for (let at = 0; at < lengthBytes; at += 4) bytes.writeUInt32LE(random.u32(), at)
  return bytes
}

const burst = async (lengthBytes: number): Promise<void> => {
  for (let at = 0; at < lengthBytes; at += 256 * 1024) await rig.client.write(random.int(0, 255) * 256 * 1024, noise(256 * 1024))
}

/** How many connections the stream has had. */
const connections = (): number => rig.sites.agent.log().split('stream begins').length - 1
const isConnected = async (): Promise<boolean> => (await rig.sites.pluginStatus()).peer.state === 'connected'

/** @returns how long after `sinceMs` it was valid */
const arrives = async ({ checkpointId, sha256 }: Snapshot, sinceMs = performance.now()): Promise<number> => {
  await rig.untilValid(checkpointId, LATE_MS)
  const lateMs = Math.round(performance.now() - sinceMs)
  expect(await rig.sha256Of(checkpointId)).toBe(sha256)
  return lateMs
}

test('the line is as poor as it should be', async () => {
  const [command, ...place] = rig.link.protectedSite
  const program = `const from = performance.now(); require('net').connect(8765, '${rig.link.recoveryHost}', () => { console.log(performance.now() - from); process.exit(0) })`
  const { stdout } = await runTool(command, [...place, process.execPath, '-e', program], { env: { NODE_OPTIONS: '' } })
  expect(Number(stdout)).toBeGreaterThan(300)
}, 60_000)

test('what changes little arrives, a little late', async () => {
  const before = connections()
  for (let n = 0; n < 15; n++) await rig.client.write(random.int(0, 64 * 256) * 4096, Buffer.alloc(4096, n + 1))
  console.log(`valid after ${await arrives(await rig.snapshot())} ms`)
  expect(connections()).toBe(before)
}, LATE_MS + 60_000)

test('what takes longer than the protected site bears silence arrives late and right, over the same connection', async () => {
  const before = connections()
  const beganMs = performance.now()
  await burst(2 * MiB)
  const lateMs = await arrives(await rig.snapshot(), beganMs)
  console.log(`2 MiB: valid after ${lateMs} ms`)
  expect(lateMs).toBeGreaterThan(SILENCE_MS)
  expect(connections()).toBe(before)
  expect(await isConnected()).toBe(true)
}, LATE_MS + 60_000)

test('a line that says nothing any more, and closes nothing, is noticed; when it is back, one connection goes on', async () => {
  const before = connections()
  await rig.client.write(0, noise(64 * 1024))
  const written = await rig.snapshot()
  await rig.link.cut()
  await until('silence is noticed', 60_000, async () => !(await isConnected()) || undefined)
  await rig.link.pass()
  await rig.link.lose(0.02)
  console.log(`back: valid after ${await arrives(written)} ms`)
  // It may have arrived before the line was cut.
  await until('the stream begins again', 60_000, async () => connections() > before || undefined)
  expect(connections()).toBe(before + 1)
}, LATE_MS + 120_000)

test('more than the line can take goes into the files, and memory stays within its bounds', async () => {
  const before = connections()
  await burst(2 * MEMORY_BYTES)
  // What waits is told each second: the burst may be over before.
  const { bufferedBytes, state } = await until('what the line cannot take is in files', 10_000, async () => {
    const vm = await rig.vm()
    return (vm.spilledBytes ?? 0) > MEMORY_BYTES / 4 ? vm : undefined
  }, async () => JSON.stringify(await rig.vm()))
  expect(state).toBe('streaming')
  expect(bufferedBytes).toBeLessThanOrEqual(MEMORY_BYTES)
  const written = await rig.snapshot()
  expect(await isConnected()).toBe(true)
  await rig.link.heal()
  console.log(`healed: valid after ${await arrives(written)} ms`)
  expect(connections()).toBe(before)
  expect((await rig.events()).filter((message) => / is (tracking|detached)/.test(message))).toEqual([])
}, LATE_MS + 60_000)
