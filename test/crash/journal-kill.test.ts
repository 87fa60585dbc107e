import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { afterAll, expect, test } from '@jest/globals'
import { SegmentSealer, VmStore } from '../../agent/journal/index.ts'
import { seededRandom, temporaryDirectory } from '../../agent/journal/testing.ts'
import { silentLogger } from '../../core/log/index.ts'
import { BASE_END, dataAt, RECORD_BYTES, SLOTS } from './journal-stream.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

const KILLS = process.env.CDP_ALL === undefined ? 16 : 120
const writer = join(import.meta.dirname, import.meta.url.endsWith('.ts') ? 'journal-writer.ts' : 'journal-writer.js')

/** Runs the writer until it has told `acks` times what is durable, kills it, and returns the newest it told. */
const writeUntilKilled = async (directory: string, acks: number, again: number): Promise<number> => {
  const child = spawn(process.execPath, [writer, directory, String(again)], { stdio: ['ignore', 'pipe', 'pipe'], env: { ...process.env, NODE_OPTIONS: '' } })
  let complaint = ''
  child.stderr.on('data', (chunk: Buffer) => (complaint += chunk.toString()))
  const exited = once(child, 'exit')
  let acknowledged = 0
  let count = 0
  for await (const line of createInterface(child.stdout)) {
    const seq = Number(line)
    expect(seq).toBeGreaterThan(acknowledged)
    acknowledged = seq
    if (++count === acks) child.kill('SIGKILL')
  }
  await exited
  expect({ signal: child.signalCode, complaint }).toEqual({ signal: 'SIGKILL', complaint: '' })
  return acknowledged
}

const checkJournal = async (store: VmStore): Promise<void> => {
  let nextSeq = store.baseSeq + 1
  for (const { segmentNumber } of store.segments) {
    for await (const { header, frameOffset } of store.recordsOf(segmentNumber)) {
      expect(header.firstSeq).toBe(nextSeq)
      const { payload } = await store.readFrame(segmentNumber, frameOffset)
      for (let seq = header.firstSeq; seq <= header.lastSeq; seq++) {
        const at = (seq - header.firstSeq) * RECORD_BYTES
        expect(payload.compare(dataAt(seq), 0, RECORD_BYTES, at, at + RECORD_BYTES)).toBe(0)
      }
      nextSeq = header.lastSeq + 1
    }
  }
  expect(nextSeq).toBe(store.durableSeq + 1)
}

/** Each slot of the mirror holds the newest acknowledged write to it, or a later one. */
const checkMirror = async (directory: string, directSeq: number): Promise<void> => {
  const mirror = await readFile(join(directory, 'mirror/0.raw'))
  for (let slot = 0; slot < SLOTS; slot++) {
    const promised = directSeq - ((directSeq - slot + SLOTS) % SLOTS)
    const found = mirror.readUInt32LE(slot * RECORD_BYTES)
    if (promised >= 1) expect({ slot, found, atLeast: found >= promised, inSlot: found % SLOTS }).toEqual({ slot, found, atLeast: true, inSlot: slot })
    if (found > 0) expect(mirror.compare(dataAt(found), 0, RECORD_BYTES, slot * RECORD_BYTES, (slot + 1) * RECORD_BYTES)).toBe(0)
  }
}

test(`${KILLS} times SIGKILL while appending: all that was acknowledged is there, in order, once`, async () => {
  const seed = Number(process.env.CDP_SEED ?? Math.floor(Math.random() * 2 ** 31))
  process.stdout.write(`journal-kill: CDP_SEED=${seed}\n`)
  const random = seededRandom(seed)
  await using directory = await temporaryDirectory()
  let directKills = 0
  let sealingKills = 0
  for (let kill = 0; kill < KILLS; kill++) {
    const acknowledged = await writeUntilKilled(directory.path, 1 + Math.floor(random() * (kill < 4 ? 2 : 25)), Math.floor(random() * 8))
    await using store = await VmStore.open({ directory: directory.path, vm: 'kill', log: silentLogger, clock: { nowUnixMs: Date.now }, sealer, limits: { segmentRecords: 50 } })
    expect(store.durableSeq).toBeGreaterThanOrEqual(acknowledged)
    expect(store.damage()).toEqual([])
    if (!store.baseComplete) {
      directKills++
      await checkMirror(directory.path, store.durableSeq)
      continue
    }
    expect(store.baseSeq).toBe(BASE_END)
    await checkMirror(directory.path, BASE_END - 1)
    if (store.openReport.resealed.length > 0) sealingKills++
    await checkJournal(store)
    await store.sealingIdle()
    if (kill % 4 === 3) expect(await store.verify()).toMatchObject({ damage: [] })
  }
  process.stdout.write(`journal-kill: ${directKills} during the initial sync, ${sealingKills} before a sealing was done\n`)
}, 300_000)
