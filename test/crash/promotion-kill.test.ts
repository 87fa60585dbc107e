import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { afterAll, expect, test } from '@jest/globals'
import { FilePool, PageCache } from '../../agent/index/index.ts'
import { loadVmState, recoverableFrom, SegmentSealer, VmStore } from '../../agent/journal/index.ts'
import { seededRandom, temporaryDirectory } from '../../agent/journal/testing.ts'
import { FrameCache, ReadGate, RecoveryPoint } from '../../agent/recovery/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { BASE_END, dataAt, frameAt, RECORD_BYTES, recordCountAt, SLOTS, STREAM_DISKS } from './journal-stream.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

const KILLS = process.env.CDP_ALL === undefined ? 12 : 100
const writer = join(import.meta.dirname, import.meta.url.endsWith('.ts') ? 'promotion-writer.ts' : 'promotion-writer.js')

/** Runs a promotion and kills it after so many lines. @returns the lines, and whether it was killed */
const promoteUntilKilled = async (directory: string, targetSeq: number, lines: number): Promise<{ told: string[]; killed: boolean }> => {
  const child = spawn(process.execPath, [writer, directory, String(targetSeq)], { stdio: ['ignore', 'pipe', 'pipe'], env: { ...process.env, NODE_OPTIONS: '' } })
  let complaint = ''
  child.stderr.on('data', (chunk: Buffer) => (complaint += chunk.toString()))
  const exited = once(child, 'exit')
  const told: string[] = []
  for await (const line of createInterface(child.stdout)) {
    told.push(line)
    if (told.length === lines) child.kill('SIGKILL')
  }
  await exited
  expect(complaint).toBe('')
  return { told, killed: child.signalCode === 'SIGKILL' }
}

const open = (directory: string): Promise<VmStore> =>
  VmStore.open({ directory, vm: 'kill', log: silentLogger, clock: { nowUnixMs: Date.now }, sealer, limits: { segmentRecords: 50 } })

/** Appends whole frames up to `toSeq` or a little further. */
const append = async (directory: string, toSeq: number): Promise<number> => {
  await using store = await open(directory)
  const { epoch, durableSeq } = await store.beginEpoch(STREAM_DISKS)
  let seq = durableSeq + 1
  while (seq <= toSeq) {
    store.accept(frameAt(seq, epoch))
    seq += recordCountAt(seq)
    if (store.queuedBytes > 1_000_000) await store.flush()
  }
  await store.flush()
  await store.sealingIdle()
  return store.durableSeq
}

/** What a slot holds after `seq`: the newest record for it. The end of the initial sync is a record without data. */
const slotAt = (seq: number, slot: number): Buffer => {
  let newest = seq - ((seq - slot + SLOTS * 1000) % SLOTS)
  if (newest === BASE_END) newest -= SLOTS
  return newest < 1 ? Buffer.alloc(RECORD_BYTES) : dataAt(newest)
}

const expectPoint = async (directory: string, seq: number): Promise<void> => {
  await using files = new FilePool()
  await using point = await RecoveryPoint.open({ vmDirectory: directory, seq, files, pages: new PageCache(1 << 18), frames: new FrameCache(1 << 20), gate: new ReadGate(4) })
  const disk = Buffer.concat(await point.read(0, 0, SLOTS * RECORD_BYTES))
  for (let slot = 0; slot < SLOTS; slot++) {
    if (!disk.subarray(slot * RECORD_BYTES, (slot + 1) * RECORD_BYTES).equals(slotAt(seq, slot))) throw new Error(`the state after ${seq}: slot ${slot} holds ${disk.readUInt32LE(slot * RECORD_BYTES)}`)
  }
}

test(`${KILLS} times SIGKILL while the base moves up: what is above stays exact, what is below is refused, and it is done again`, async () => {
  const seed = Number(process.env.CDP_SEED ?? Math.floor(Math.random() * 2 ** 31))
  process.stdout.write(`promotion-kill: CDP_SEED=${seed}\n`)
  const random = seededRandom(seed)
  const below = (bound: number): number => Math.floor(random() * bound)
  await using directory = await temporaryDirectory()
  const { path } = directory
  let newest = await append(path, 900)
  const halfway = { intent: 0, done: 0, removing: 0 }
  for (let kill = 0; kill < KILLS; kill++) {
    newest = await append(path, newest + 100 + below(300))
    const before = await loadVmState(join(path, 'vm.json'))
    if (before === undefined) throw new Error('no vm.json')
    const target = before.promotingToSeq ?? before.baseSeq + 1 + below(newest - before.baseSeq)
    const segmentsBefore = (await readdir(join(path, 'journal'))).length
    const { told } = await promoteUntilKilled(path, target, 1 + below(kill % 2 === 0 ? 14 : 120))
    const after = await loadVmState(join(path, 'vm.json'))
    if (after === undefined) throw new Error('no vm.json')
    expect([before.baseSeq, target]).toContain(after.baseSeq)
    if (after.promotingToSeq !== undefined) halfway.intent++
    else if (after.baseSeq === target) halfway.done++
    if (told.includes('promoted') && !told.includes('trimmed') && (await readdir(join(path, 'journal'))).length < segmentsBefore) halfway.removing++
    const floor = recoverableFrom(after)
    expect([before.baseSeq, target]).toContain(floor)
    if (told.some((line) => line === 'batch')) expect(floor).toBe(target)
    if (floor > BASE_END) await expect(expectPoint(path, floor - 1)).rejects.toMatchObject({ code: 'NOT_FOUND' })
    for (const seq of [floor, newest, floor + below(newest - floor + 1), floor + below(newest - floor + 1)]) await expectPoint(path, seq)
    await using store = await open(path)
    expect(store.damage()).toEqual([])
    expect((await store.verify()).damage).toEqual([])
    // Sums are right whenever they are asked: with the base that a crash left, and not at all in between.
    const checked = await store.base.checkMirror(0, 0, SLOTS * RECORD_BYTES, AbortSignal.timeout(60_000))
    expect(checked?.bad ?? []).toEqual([])
    expect(checked === undefined).toBe(after.promotingToSeq !== undefined)
    if (kill % 3 !== 2) continue
    await store.base.promote(target)
    await store.base.trim()
    await store.sealingIdle()
    expect(store.segments[0].lastSeq > target || store.segments.length === 1).toBe(true)
    for (const seq of [target, newest]) await expectPoint(path, seq)
  }
  process.stdout.write(`promotion-kill: killed ${halfway.intent} times with a half-promoted mirror, ${halfway.done} times behind it, ${halfway.removing} while segments went\n`)
  expect(halfway.intent).toBeGreaterThan(0)
}, 300_000)
