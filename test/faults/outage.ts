import { randomInt } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import { errorMessage } from '../../core/errors/index.ts'
import { Random } from '../kit/random.ts'
import { until } from '../lab/sites.ts'
import { DiskRig, VPG, type Snapshot } from './disk-rig.ts'

// An outage of the line while a VM writes without a pause: npm run outage -- [--seconds N] [--rate MB/s] [--seed S]. Every checkpoint that is cut meanwhile
// has to become valid when the line is back, and samples of them have to be what the disk was, bit by bit. One JSON object as the last line of stdout.
// Exit code 0 only if nothing is missing.

const usage = 'usage: npm run outage -- [--seconds N] [--rate MB/s] [--seed S]'
const MiB = 1 << 20
const DISK_BYTES = 128 * MiB
const WRITE_BYTES = 256 * 1024
const SAMPLES = 4
const CHECKPOINT_EVERY_MS = 1_000
/** A busy machine cuts late; two checkpoints that are further apart than this have lost one between them. */
const LONGEST_PAUSE_MS = 5_000
const SPILL_FACTOR = 1.5

const positive = (name: string, text: string): number => {
  const value = Number(text)
  if (!Number.isFinite(value) || value <= 0) throw new Error(`--${name} ${text}: expected a number above 0`)
  return value
}

/** Writes what does not compress, at random places, at a rate or as fast as it goes, for so long. @returns bytes written */
const writeFor = async ({ client }: DiskRig, random: Random, filling: Buffer, ms: number, bytesPerSec: number): Promise<number> => {
  const beganMs = performance.now()
  let writtenBytes = 0
  const lane = async (): Promise<void> => {
    while (performance.now() - beganMs < ms) {
      const aheadMs = (writtenBytes / bytesPerSec) * 1000 - (performance.now() - beganMs)
      if (aheadMs > 0) await delay(aheadMs)
      writtenBytes += WRITE_BYTES
      const from = random.int(0, filling.length - WRITE_BYTES)
      await client.write(random.int(0, DISK_BYTES / WRITE_BYTES) * WRITE_BYTES, filling.subarray(from, from + WRITE_BYTES))
    }
  }
  await Promise.all([lane(), lane()])
  return writtenBytes
}

const main = async (): Promise<number> => {
  const { values } = parseArgs({ options: { seconds: { type: 'string', default: '60' }, rate: { type: 'string', default: '50' }, seed: { type: 'string', default: String(randomInt(1, 2 ** 31)) } } })
  const [seconds, rate, seed] = [positive('seconds', values.seconds), positive('rate', values.rate), positive('seed', values.seed)]
  const say = (line: string): void => void process.stderr.write(`${line}\n`)
  const random = new Random(seed)
  const filling = Buffer.alloc(64 * MiB)
  for (let at = 0; at < filling.length; at += 4) filling.writeUInt32LE(random.u32(), at)
  await using rig = await DiskRig.start({ diskBytes: DISK_BYTES, spillBytes: Math.ceil(seconds * rate * 1e6 * SPILL_FACTOR) + 256 * MiB })
  const { sites } = rig
  await rig.protect(CHECKPOINT_EVERY_MS)
  say(`seed ${seed}: protected; the line is cut for ${seconds} s`)
  const told = (await rig.events()).length
  await rig.link.cut()
  const cutAtUnixMs = Date.now()
  const samples: Snapshot[] = []
  let writtenBytes = 0
  let spilledBytes = 0
  let writingMs = 0
  for (let part = 0; part < SAMPLES; part++) {
    const beganMs = performance.now()
    writtenBytes += await writeFor(rig, random, filling, (seconds * 1000) / SAMPLES, rate * 1e6)
    writingMs += performance.now() - beganMs
    samples.push(await rig.snapshot())
    spilledBytes = Math.max(spilledBytes, (await rig.vm()).spilledBytes ?? 0)
    say(`${Math.round(writtenBytes / MiB)} MiB written, ${Math.round(spilledBytes / MiB)} MiB in the spill`)
  }
  const healedAtUnixMs = Date.now()
  await rig.link.heal()
  const backMs = performance.now()
  await until('a checkpoint from after the outage is valid', 60_000 + seconds * 10_000, async () => (await sites.checkpoints(VPG, 5)).some(({ atUnixMs, state }) => atUnixMs > healedAtUnixMs && (state === 'valid' || state === 'proved')) || undefined, async () => JSON.stringify(await rig.vm()))
  const drainMs = performance.now() - backMs
  const cutMeanwhile = (await sites.checkpoints(VPG, 10_000)).filter(({ atUnixMs }) => atUnixMs >= cutAtUnixMs && atUnixMs <= healedAtUnixMs)
  const valid = cutMeanwhile.filter(({ state }) => state === 'valid' || state === 'proved')
  const times = [cutAtUnixMs, ...valid.map(({ atUnixMs }) => atUnixMs).sort((one, other) => one - other), healedAtUnixMs]
  const longestPauseMs = Math.max(...times.slice(1).map((atUnixMs, at) => atUnixMs - times[at]))
  let exact = 0
  for (const { checkpointId, sha256 } of samples) if ((await rig.sha256Of(checkpointId)) === sha256) exact++
  const letGo = (await rig.events()).slice(told).filter((message) => / is (tracking|detached|syncing)/.test(message))
  const ok = valid.length > 0 && valid.length === cutMeanwhile.length && longestPauseMs <= LONGEST_PAUSE_MS && exact === SAMPLES && letGo.length === 0 && spilledBytes > 0
  for (const message of letGo) say(message)
  process.stdout.write(`${JSON.stringify({
    ok, seconds: Math.round((healedAtUnixMs - cutAtUnixMs) / 1000), megabytesPerSec: Math.round(writtenBytes / 1e3 / writingMs), writtenMiB: Math.round(writtenBytes / MiB), spilledMiB: Math.round(spilledBytes / MiB),
    checkpoints: cutMeanwhile.length, valid: valid.length, longestPauseMs, samples: SAMPLES, exact, drainSeconds: Math.round(drainMs / 1000), seed,
  })}\n`)
  return ok ? 0 : 1
}

try {
  process.exitCode = await main()
} catch (error) {
  process.stderr.write(`${errorMessage(error)}\n${usage}\n`)
  process.exitCode = 2
}
