// Broken peers over real sockets: neither side crashes, hangs, leaks or stops working. CDP_SEED repeats a run, CDP_FUZZ_ROUNDS lengthens it.
import { mkdtemp, rm } from 'node:fs/promises'
import { createConnection, createServer, type Socket } from 'node:net'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals'
import { errorCode } from '../errors/index.ts'
import { NbdClient } from './client.ts'
import * as nbd from './constants.ts'
import { MemoryExport } from './memory-export.ts'
import { encodeOption, encodeString } from './option-codec.ts'
import { randomChunks, seededIntegers } from './seeded.ts'
import { NbdServer } from './server.ts'

type Below = (limit: number) => number

const SEED = Number(process.env['CDP_SEED'] ?? Date.now() >>> 0)
const ROUNDS = Number(process.env['CDP_FUZZ_ROUNDS'] ?? 300)
const MIB = 1024 * 1024
let root = ''

beforeAll(async () => {
  root = await mkdtemp('/tmp/cdp-')
  console.log(`seed ${SEED}`)
})
afterAll(async () => {
  await rm(root, { recursive: true })
})

setFlagsFromString('--expose-gc')
const collectGarbage = runInNewContext('gc') as () => void

/** Bytes the process holds after a collection: heap and buffers. */
const heldBytes = (): number => {
  collectGarbage()
  const { heapUsed, external } = process.memoryUsage()
  return heapUsed + external
}

const openSockets = (): number => process.getActiveResourcesInfo().filter((name) => name === 'PipeWrap').length

/** Lets the event loop turn until the condition holds. */
const until = async (condition: () => boolean): Promise<void> => {
  while (!condition()) await new Promise((resolve) => setImmediate(resolve))
}

const EXTREMES = [0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 4096, 4097, 65_536, 65_537, MIB, 32 * MIB, 32 * MIB + 1]

const mutate = (valid: Buffer, below: Below): Buffer => {
  let bytes = Buffer.from(valid)
  for (let times = 1 + below(4); times > 0 && bytes.length > 8; times--) {
    const at = below(bytes.length)
    switch (below(6)) {
      case 0:
        bytes[at] = (bytes[at] ?? 0) ^ (1 << below(8))
        break
      case 1:
        bytes.writeUInt32BE(EXTREMES[below(EXTREMES.length)] ?? 0, Math.min(at, bytes.length - 4))
        break
      case 2:
        bytes = bytes.subarray(0, at + 1)
        break
      case 3:
        bytes = Buffer.concat([bytes.subarray(0, at), bytes.subarray(Math.min(bytes.length, at + 1 + below(30)))])
        break
      case 4:
        bytes = Buffer.concat([bytes.subarray(0, at), Buffer.from(Array.from({ length: 1 + below(60) }, () => below(256))), bytes.subarray(at)])
        break
      default:
        bytes = Buffer.concat([bytes, bytes.subarray(at, at + below(200))])
    }
  }
  return bytes
}

const u32 = (value: number): Buffer => Buffer.from([value >>> 24, (value >> 16) & 255, (value >> 8) & 255, value & 255])

const request = (below: Below): Buffer => {
  const type = below(9)
  const lengthBytes = type === nbd.NBD_CMD_WRITE ? below(3000) : below(200_000)
  const header = Buffer.alloc(28 + (type === nbd.NBD_CMD_WRITE ? lengthBytes : 0), 0x11)
  header.writeUInt32BE(nbd.NBD_REQUEST_MAGIC, 0)
  header.writeUInt16BE(below(4) === 0 ? below(32) : 0, 4)
  header.writeUInt16BE(type, 6)
  header.writeUInt32BE(0, 16)
  header.writeUInt32BE(below(MIB), 20)
  header.writeUInt32BE(lengthBytes, 24)
  return header
}

/** What a proper client may send, from its first byte on. */
const conversation = (below: Below): Buffer => {
  const options = [
    encodeOption(nbd.NBD_OPT_STRUCTURED_REPLY), encodeOption(nbd.NBD_OPT_LIST), encodeOption(nbd.NBD_OPT_STARTTLS),
    encodeOption(nbd.NBD_OPT_SET_META_CONTEXT, [encodeString('disk'), u32(1), encodeString(nbd.BASE_ALLOCATION)]),
    encodeOption(nbd.NBD_OPT_LIST_META_CONTEXT, [encodeString('disk'), u32(0)]),
    encodeOption(nbd.NBD_OPT_INFO, [encodeString('disk'), Buffer.from([0, 1, 0, 3])]),
  ]
  const last =
    below(8) === 0 ? encodeOption(nbd.NBD_OPT_EXPORT_NAME, [Buffer.from('disk')]) : encodeOption(nbd.NBD_OPT_GO, [encodeString('disk'), Buffer.from([0, 0])])
  const chosen = Array.from({ length: below(6) }, () => options[below(options.length)] ?? Buffer.alloc(0))
  return Buffer.concat([u32(3), ...chosen, last, ...Array.from({ length: below(20) }, () => request(below))])
}

describe('fuzz', () => {
  test('a server that gets broken handshakes and requests closes them and goes on serving, without growing', async () => {
    const below = seededIntegers(SEED)
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB })
    const path = `${root}/s`
    await using server = await NbdServer.listen({ address: { path }, findExport: (name) => (name === 'disk' ? disk : undefined), listExports: () => [disk] })
    const attack = async (): Promise<void> => {
      const socket = createConnection({ path })
      const closed = new Promise((resolve) => socket.on('close', resolve))
      let broken = false
      socket.on('error', () => (broken = true))
      socket.resume()
      // Handshake and requests are broken apart half of the time, so that requests are reached at all.
      const whole = conversation(below)
      const keptBytes = below(2) === 0 ? 0 : below(whole.length)
      const bytes = Buffer.concat([whole.subarray(0, keptBytes), mutate(whole.subarray(keptBytes), below)])
      for (const chunk of randomChunks(bytes, below, 5000)) {
        if (broken || !socket.writable) break
        socket.write(chunk)
        if (below(3) === 0) await new Promise((resolve) => setImmediate(resolve))
      }
      if (below(4) === 0) socket.destroy()
      else socket.end()
      await closed
    }
    const healthy = async (): Promise<void> => {
      await using client = await NbdClient.connect({ path }, { exportName: 'disk', metaContexts: [nbd.BASE_ALLOCATION] })
      await client.write(0, Buffer.alloc(4096, 0x77))
      expect((await client.read(0, 4096)).equals(Buffer.alloc(4096, 0x77))).toBe(true)
      expect(await client.blockStatus(0, MIB)).toBeDefined()
    }
    const round = async (): Promise<void> => {
      for (let i = 0; i < ROUNDS; i++) await attack()
      await healthy()
      await until(() => server.counters.openConnections === 0)
      expect(disk.openCount).toBe(0)
    }
    await round()
    const [socketsBefore, heldBefore] = [openSockets(), heldBytes()]
    await round()
    await until(() => openSockets() <= socketsBefore)
    expect(heldBytes() - heldBefore).toBeLessThan(8 * MIB)
    const { protocolErrors, errorReplies, requests } = server.counters
    console.log(`${2 * ROUNDS} connections: ${requests} requests, ${errorReplies} refused, ${protocolErrors} protocol errors`)
    // The attack really got to both phases.
    expect(protocolErrors).toBeGreaterThan(ROUNDS / 4)
    expect(errorReplies).toBeGreaterThan(ROUNDS / 4)
    expect(requests - errorReplies).toBeGreaterThan(ROUNDS / 4)
  }, 120_000)

  test('a client of a broken server always ends with a result or a coded error', async () => {
    const below = seededIntegers(SEED + 1)
    const disk = new MemoryExport({ name: 'disk', sizeBytes: MIB, sparseReads: true, readOnly: true })
    disk.bytes.fill(3, 0, 50_000)
    await using server = await NbdServer.listen({ address: { path: `${root}/real` }, findExport: () => disk, listExports: () => [disk] })
    const session = async (path: string, deadlineMs: number): Promise<void> => {
      await using client = await NbdClient.connect({ path }, { exportName: 'disk', metaContexts: [nbd.BASE_ALLOCATION], deadlineMs })
      const signal = AbortSignal.timeout(deadlineMs)
      await client.read(0, 1000, signal)
      await client.read(40_000, 20_000, signal)
      await client.blockStatus(0, MIB, signal)
    }
    // One proper session, recorded turn by turn.
    const turns: Buffer[] = []
    const recorder = createServer((socket) => {
      const upstream = createConnection(server.address as { path: string })
      upstream.on('data', (chunk: Buffer) => {
        turns.push(chunk)
        socket.write(chunk)
      })
      socket.pipe(upstream).on('close', () => socket.end())
    })
    await new Promise<void>((resolve) => recorder.listen({ path: `${root}/recorder` }, resolve))
    await session(`${root}/recorder`, 5_000)
    await new Promise((resolve) => recorder.close(resolve))
    expect(turns.length).toBeGreaterThan(4)

    let script: Buffer[] = []
    const sockets = new Set<Socket>()
    const liar = createServer((socket) => {
      let turn = 0
      sockets.add(socket)
      const next = (): void => {
        if (turn < script.length) socket.write(script[turn++] ?? Buffer.alloc(0))
        else socket.end()
      }
      socket.on('error', () => undefined)
      socket.on('close', () => sockets.delete(socket))
      socket.on('data', next)
      // A client that waits for more than is left gets the end.
      socket.setTimeout(10, () => socket.end())
      next()
    })
    await new Promise<void>((resolve) => liar.listen({ path: `${root}/liar` }, resolve))
    const outcomes = new Map<string, number>()
    for (let i = 0; i < ROUNDS / 2; i++) {
      script = [...turns]
      const which = below(turns.length)
      script[which] = mutate(turns[which] ?? Buffer.alloc(0), below)
      const outcome = await session(`${root}/liar`, 5_000).then(() => 'ok', (error: unknown) => errorCode(error) ?? String(error))
      outcomes.set(outcome, (outcomes.get(outcome) ?? 0) + 1)
    }
    await until(() => sockets.size === 0)
    await new Promise((resolve) => liar.close(resolve))
    console.log(JSON.stringify(Object.fromEntries(outcomes)))
    for (const outcome of outcomes.keys()) expect(['ok', 'NBD_PROTOCOL', 'NBD_REFUSED', 'CLOSED', 'BAD_INPUT']).toContain(outcome)
    expect(outcomes.get('NBD_PROTOCOL')).toBeGreaterThan(5)
  }, 120_000)
})
