import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { createServer, connect } from 'node:net'
import type { Server, Socket } from 'node:net'
import { mkdir, mkdtemp, open, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from '@jest/globals'
import { Catalogue } from '../../agent/checkpoint/index.ts'
import { HashDesk } from '../../agent/hashes/index.ts'
import { GroupGenerations, Ingest, VmRegistry } from '../../agent/ingest/index.ts'
import { SegmentSealer } from '../../agent/journal/index.ts'
import { PinRegistry } from '../../agent/recovery/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { ClientHandshake, MemoryExport, NBD_CMD_WRITE, NBD_REQUEST_MAGIC, NbdClient, NbdServer } from '../../core/nbd/index.ts'
import { hasData, hasRange } from '../../core/record/index.ts'
import { CaptureSession, GroupClock } from '../../plugin/capture/index.ts'
import type { CaptureEvent, CaptureStats } from '../../plugin/capture/index.ts'
import { Random, testSeed } from '../kit/random.ts'

const MiB = 1024 * 1024
const DISK_BYTES = 4 * MiB
const KEYS = ['scsi0', 'scsi1']
const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

class Agent implements AsyncDisposable {
  readonly catalogue: Catalogue
  readonly registry: VmRegistry
  readonly ingest: Ingest
  readonly generations: GroupGenerations
  readonly pins = new PinRegistry()
  readonly hashes = new HashDesk({ pins: this.pins })
  readonly valid: string[] = []
  readonly sockets = new Set<Socket>()
  readonly path: string
  #server: Server

  constructor(dir: string) {
    this.path = join(dir, 'a')
    this.catalogue = new Catalogue(':memory:')
    this.generations = new GroupGenerations(join(dir, 'generations'), Date.now)
    this.registry = new VmRegistry({
      directory: join(dir, 'vms'), catalogue: this.catalogue, sealer, log: silentLogger, clock: { nowUnixMs: Date.now }, limits: { segmentBytes: 2 * MiB, segmentRecords: 1024 },
      onValid: (siteId, vpg, one) => {
        this.valid.push(one.id)
        this.ingest.tellValid(siteId, vpg, one)
      },
    })
    this.ingest = new Ingest({ registry: this.registry, catalogue: this.catalogue, generations: this.generations, log: silentLogger, hashes: this.hashes })
    this.#server = createServer((socket) => {
      this.sockets.add(socket)
      socket.once('close', () => this.sockets.delete(socket))
      this.ingest.take(socket, 'site')
    })
  }

  async listen(): Promise<this> {
    await new Promise<void>((resolve) => this.#server.listen(this.path, resolve))
    return this
  }

  /** The link breaks. */
  cut(): void {
    for (const socket of this.sockets) socket.destroy()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.ingest[Symbol.dispose]()
    await this.hashes[Symbol.asyncDispose]()
    await new Promise((resolve) => this.#server.close(resolve))
    await this.registry[Symbol.asyncDispose]()
    this.catalogue[Symbol.dispose]()
  }
}

const dial = (path: string): Promise<Socket> =>
  new Promise((resolve, reject) => {
    const socket = connect(path)
    socket.once('connect', () => resolve(socket))
    socket.once('error', (cause) => reject(new CdpError('UNREACHABLE', 'nobody listens', { cause })))
  })

type Site = AsyncDisposable & { dir: string; session: CaptureSession; events: CaptureEvent[]; until: (is: (event: CaptureEvent) => boolean) => Promise<CaptureEvent>; clock: GroupClock; sources: MemoryExport[]; exportPath: string; targetPath: string; slowReads: { gate: Promise<void> | undefined }; budgetBytes: number; spillBytes: number }

const startSite = async (options: { connect?: () => Promise<Socket>; budgetBytes?: number; spillBytes?: number; slowAckMs?: number } = {}): Promise<Site> => {
  const dir = await mkdtemp('/tmp/cdp-')
  const clock = new GroupClock()
  const events: CaptureEvent[] = []
  const waiters: { is: (event: CaptureEvent) => boolean; resolve: (event: CaptureEvent) => void }[] = []
  const slowReads: Site['slowReads'] = { gate: undefined }
  const sources = KEYS.map((key) => {
    const source = new MemoryExport({ name: key, sizeBytes: DISK_BYTES })
    const read = source.read.bind(source)
    source.read = async (offsetBytes, lengthBytes) => {
      await slowReads.gate
      return read(offsetBytes, lengthBytes)
    }
    return source
  })
  const exportPath = join(dir, 'e')
  const server = await NbdServer.listen({ address: { path: exportPath }, findExport: (name) => sources.find((source) => source.name === name), listExports: () => sources })
  const targetPath = join(dir, 't')
  const session = new CaptureSession({
    vm: '101', vpg: 'shop', vms: ['101'], targetPath, disks: KEYS.map((key, disk) => ({ disk, key, sizeBytes: DISK_BYTES })), budgetBytes: options.budgetBytes ?? 16 * MiB, lingerMs: 1,
    ...(options.spillBytes === undefined ? {} : { spill: { directory: join(dir, 'spill'), limitBytes: options.spillBytes, reserveBytes: 0 } }),
    slowAck: { p99Ms: 1e9, maxMs: options.slowAckMs ?? 1e9 }, clock, connect: options.connect ?? (() => dial(join(dir, 'a'))), nowUnixMs: Date.now, random: () => 0,
    emit: (event) => {
      events.push(event)
      for (const waiter of waiters.filter(({ is }) => is(event))) {
        waiters.splice(waiters.indexOf(waiter), 1)
        waiter.resolve(event)
      }
    },
  })
  await session.start()
  return {
    budgetBytes: options.budgetBytes ?? 16 * MiB, spillBytes: options.spillBytes ?? 0, dir, session, events, clock, sources, exportPath, targetPath, slowReads,
    until: (is) => new Promise((resolve) => waiters.push({ is, resolve })),
    [Symbol.asyncDispose]: async () => {
      await session[Symbol.asyncDispose]()
      await server[Symbol.asyncDispose]()
      await rm(dir, { recursive: true, force: true })
    },
  }
}

const wholeCopy = (site: Site) =>
  site.session.sync({ kind: 'initial', reason: 'first copy', exportSocketPath: site.exportPath, rateBytesPerSec: 0, disks: KEYS.map((key, disk) => ({ disk, exportName: key, sizeBytes: DISK_BYTES, fromBytes: 0, wholeAbove: true, totalBytes: DISK_BYTES })) })

const comparison = (site: Site, kind: 'delta' | 'initial' = 'delta') =>
  site.session.sync({ kind, reason: 'x', exportSocketPath: site.exportPath, rateBytesPerSec: 0, disks: KEYS.map((key, disk) => ({ disk, exportName: key, sizeBytes: DISK_BYTES, fromBytes: 0, wholeAbove: true, byHash: true, totalBytes: DISK_BYTES })) })

/** Guests that write at random, each write on the source first, until told to stop. */
const writers = async (site: Site, random: Random): Promise<() => Promise<void>> => {
  const clients = await Promise.all(KEYS.map((exportName) => NbdClient.connect({ path: site.targetPath }, { exportName })))
  let running = true
  const ended = clients.map(async (client, disk) => {
    while (running) {
      const lengthBytes = 512 * (random.chance(0.1) ? random.int(1, 600) : random.int(1, 20))
      const at = 512 * random.int(0, (DISK_BYTES - lengthBytes) / 512)
      const data = Buffer.alloc(lengthBytes, random.int(0, 256))
      data.copy(site.sources[disk].bytes, at)
      await client.write(at, data)
      await new Promise((resolve) => setTimeout(resolve, random.int(0, 2)))
    }
  })
  return async () => {
    running = false
    await Promise.all(ended)
    for (const client of clients) await client[Symbol.asyncDispose]()
  }
}

const sentBytes = (site: Site): number => {
  const last = site.events.findLast((event) => event.is === 'sync')
  return last?.is === 'sync' ? last.sentBytes : -1
}

/** What the agent holds of a disk: its mirror, then every record of the journal. */
const replayed = async (agent: Agent, dir: string, disk: number, upToSeq = Infinity): Promise<Buffer> => {
  const store = agent.registry.get('site', '101')?.store
  if (store === undefined) throw new Error('no store')
  const content = await readFile(join(dir, 'vms/site/101/mirror', `${disk}.raw`))
  let seq = store.baseSeq
  for (const { segmentNumber } of store.segments) {
    const frames: number[] = []
    for await (const { frameOffset } of store.recordsOf(segmentNumber)) frames.push(frameOffset)
    for (const at of frames) {
      const { header, table, payload } = await store.readFrame(segmentNumber, at)
      if (header.firstSeq !== seq + 1) throw new Error(`journal goes on with ${header.firstSeq} after ${seq}`)
      seq = header.lastSeq
      for (let index = 0; index < table.count; index++) {
        const kind = table.kind(index)
        if (table.disk(index) !== disk || !hasRange(kind) || header.firstSeq + index > upToSeq) continue
        const start = table.offsetBytes(index)
        if (hasData(kind)) payload.copy(content, start, table.payloadOffset(index), table.payloadOffset(index) + table.lengthBytes(index))
        else content.fill(0, start, start + table.lengthBytes(index))
      }
    }
  }
  expect(seq).toBe(store.durableSeq)
  return content
}

describe('a capture session and an agent', () => {
  test('initial copy under writes, a link that breaks again and again: every record arrives once, in order, and cuts become valid', async () => {
    const random = new Random(testSeed())
    process.stdout.write(`seed ${random.seed}\n`)
    await using site = await startSite()
    await using agent = await new Agent(site.dir).listen()
    for (const source of site.sources) for (let n = 0; n < 30; n++) source.bytes.fill(random.int(1, 256), 4096 * random.int(0, 1024), DISK_BYTES / 2)
    expect(await site.session.open({ reason: 'test', epoch: { reason: 'test' } })).toMatchObject({ epoch: 1, durableSeq: 0, baseComplete: false })
    const clients = await Promise.all(KEYS.map((exportName) => NbdClient.connect({ path: site.targetPath }, { exportName })))
    let running = true
    const writers = clients.map(async (client, disk) => {
      const { bytes } = site.sources[disk]
      while (running) {
        const lengthBytes = 512 * (random.chance(0.1) ? random.int(1, 600) : random.int(1, 20))
        const at = 512 * random.int(0, (DISK_BYTES - lengthBytes) / 512)
        const data = Buffer.alloc(lengthBytes, random.int(0, 256))
        // The guest's write is on the source first.
        data.copy(bytes, at)
        await client.write(at, data)
        await new Promise((resolve) => setTimeout(resolve, random.int(0, 2)))
      }
    })
    expect((await wholeCopy(site)).lastSeq).toBeGreaterThan(0)
    const marks: string[] = []
    for (let n = 0; n < 12; n++) {
      const back = n % 3 === 2 ? site.until((event) => event.is === 'link' && event.up) : undefined
      if (back !== undefined) agent.cut()
      const id = `c${n}`
      if ('namedSeq' in (await site.session.cut({ c: site.clock.cut(), mark: { id, vpg: 'shop', vms: ['101'], atUnixMs: n + 1, kind: 'automatic' } }))) marks.push(id)
      await back
      await new Promise((resolve) => setTimeout(resolve, 10))
    }
    running = false
    await Promise.all(writers)
    for (const client of clients) await client[Symbol.asyncDispose]()
    const { durableSeq } = await site.session.end({ deadlineMs: 5000 })
    expect(agent.registry.get('site', '101')?.store.durableSeq).toBe(durableSeq)
    expect(agent.valid).toEqual(marks)
    expect(marks.length).toBeGreaterThan(8)
    for (const disk of [0, 1]) expect((await replayed(agent, site.dir, disk)).equals(site.sources[disk].bytes)).toBe(true)
    expect(site.events.some(({ is }) => is === 'letGo')).toBe(false)
  })

  test('a copy is refused after capture has let go, and ends at once when it lets go meanwhile; then all begins anew', async () => {
    await using site = await startSite()
    await using agent = await new Agent(site.dir).listen()
    await expect(wholeCopy(site)).rejects.toMatchObject({ code: 'ABORTED' })
    await expect(site.session.restartCopy()).rejects.toMatchObject({ code: 'ABORTED' })
    await site.session.open({ reason: 'test', epoch: { reason: 'test' } })
    for (const source of site.sources) source.bytes.fill(7)
    const gate = Promise.withResolvers<void>()
    site.slowReads.gate = gate.promise
    const copy = wholeCopy(site)
    await new Promise((resolve) => setTimeout(resolve, 20))
    await site.session.letGo({ why: 'the link is down' })
    await expect(copy).rejects.toMatchObject({ code: 'ABORTED' })
    expect(site.events.at(-1)).toEqual({ is: 'letGo', why: 'the link is down' })
    expect(await site.session.cut({ c: site.clock.cut(), mark: { id: 'c', vpg: 'shop', vms: ['101'], atUnixMs: 1, kind: 'automatic' } })).toEqual({ refused: 'capture is not attached' })
    site.slowReads.gate = undefined
    gate.resolve()
    expect(await site.session.open({ reason: 'again', epoch: { reason: 'again' } })).toMatchObject({ epoch: 2 })
    await wholeCopy(site)
    await site.session.end({ deadlineMs: 5000 })
    expect((await replayed(agent, site.dir, 0)).equals(site.sources[0].bytes)).toBe(true)
  })

  test('capture that was suspended goes on in the same epoch, with disks that grew: no cut before the end of the sync, and no proof of what was before', async () => {
    await using site = await startSite()
    await using agent = await new Agent(site.dir).listen()
    const { session } = site
    const cut = (id: string) => session.cut({ c: site.clock.cut(), mark: { id, vpg: 'shop', vms: ['101'], atUnixMs: Date.now(), kind: 'automatic' } })
    const again = { epoch: { reason: 'suspended' }, sizes: { scsi0: DISK_BYTES, scsi1: 2 * DISK_BYTES } }
    const durable = async (): Promise<unknown> => session.durable({ seq: (await session.captured()).seq })
    expect(await session.rejoin(again)).toEqual({ rejoined: false })
    await session.open({ reason: 'first', epoch: { reason: 'first' } })
    expect(await session.rejoin(again)).toEqual({ rejoined: false })
    await using client = await NbdClient.connect({ path: site.targetPath }, { exportName: 'scsi1' })
    await using other = await NbdClient.connect({ path: site.targetPath }, { exportName: 'scsi0' })
    await wholeCopy(site)
    expect(await cut('before')).toHaveProperty('namedSeq')
    expect(await session.rejoin(again)).toEqual({ rejoined: false })

    const { seq } = await session.captured()
    const waiting = session.durable({ seq: seq + 1000 })
    await session.letGo({ why: 'suspended', inPeace: true })
    await expect(waiting).rejects.toMatchObject({ code: 'ABORTED' })
    await client.write(512, Buffer.alloc(512, 9))
    expect(await session.captured()).toMatchObject({ seq: seq + 1 })
    expect(await cut('while suspended')).toEqual({ refused: 'capture is not attached' })
    await session.letGo({ why: 'suspended' })

    expect(await session.rejoin(again)).toEqual({ rejoined: true })
    await using grown = await NbdClient.connect({ path: site.targetPath }, { exportName: 'scsi1' })
    await using third = await NbdClient.connect({ path: site.targetPath }, { exportName: 'scsi0' })
    await grown.write(2 * DISK_BYTES - 512, Buffer.alloc(512, 3))
    await third.write(0, Buffer.alloc(512, 3))
    expect(await cut('before the sync')).toEqual({ refused: 'capture is not in step' })
    await wholeCopy(site)
    expect(await cut('after')).toHaveProperty('namedSeq')
    await session.proof({ mark: { ok: true, atUnixMs: 1, disks: {} } })
    await durable()
    const store = agent.registry.get('site', '101')?.store
    expect([store?.epoch, store?.disks.map(({ sizeBytes }) => sizeBytes)]).toEqual([1, [DISK_BYTES, 2 * DISK_BYTES]])
    expect(agent.valid).toEqual(['before', 'after'])
    expect(['before', 'after'].map((id) => agent.catalogue.find('site', 'shop', id)?.state)).toEqual(['valid', 'proved'])

    // With the link down the stream cannot be gone on with.
    await session.letGo({ why: 'suspended' })
    const down = site.until((event) => event.is === 'link' && !event.up)
    agent.cut()
    await down
    expect(await session.rejoin(again)).toEqual({ rejoined: false })
    await other[Symbol.asyncDispose]()
  })

  test('an attach that waits for an agent that says nothing ends when it is told to let go', async () => {
    const mute = await new Promise<Server>((resolve) => {
      const server = createServer(() => undefined).listen(0, '127.0.0.1', () => resolve(server))
    })
    const sockets: Socket[] = []
    await using site = await startSite({
      connect: async () => {
        const address = mute.address()
        const socket = connect(typeof address === 'object' && address !== null ? address.port : 0)
        sockets.push(socket)
        return socket
      },
    })
    const opening = site.session.open({ reason: 'first', epoch: { reason: 'first' } })
    opening.catch(() => undefined)
    await new Promise((resolve) => setTimeout(resolve, 50))
    await site.session.letGo({ why: 'suspended', inPeace: true })
    await expect(opening).rejects.toMatchObject({ code: 'ABORTED' })
    for (const socket of sockets) socket.destroy()
    mute.close()
  })

  test('a newer attach of the same VM makes the older one let go; its acknowledgements go on', async () => {
    await using site = await startSite()
    await using agent = await new Agent(site.dir).listen()
    await using other = await startSite({ connect: () => dial(agent.path) })
    await site.session.open({ reason: 'first', epoch: { reason: 'first' } })
    const letGo = site.until(({ is }) => is === 'letGo')
    await other.session.open({ reason: 'second', epoch: { reason: 'second' } })
    expect(await letGo).toMatchObject({ why: expect.stringContaining('newer attach') })
    await wholeCopy(other)
    expect(await other.session.end({ deadlineMs: 5000 })).toEqual({ durableSeq: agent.registry.get('site', '101')?.store.durableSeq })
  })

  test('a request that is refused stops a job of QEMU: capture lets go, and nobody is let in before the next attach', async () => {
    await using site = await startSite()
    await using agent = await new Agent(site.dir).listen()
    const connected = (): Promise<NbdClient> => NbdClient.connect({ path: site.targetPath }, { exportName: 'scsi1' })
    await expect(connected()).rejects.toMatchObject({ code: 'CLOSED' })
    await site.session.open({ reason: 'first', epoch: { reason: 'first' } })
    await using client = await connected()
    const letGo = site.until(({ is }) => is === 'letGo')
    await expect(client.read(0, 512)).rejects.toMatchObject({ code: expect.stringMatching(/NBD_REFUSED|CLOSED/) })
    expect(await letGo).toMatchObject({ why: expect.stringContaining('scsi1') })
    await client.closed
    await expect(connected()).rejects.toMatchObject({ code: 'CLOSED' })
    await site.session.open({ reason: 'second', epoch: { reason: 'second' } })
    await using again = await connected()
    await again.write(0, Buffer.alloc(512, 1))
    expect(agent.registry.get('site', '101')?.store.epoch).toBe(2)
  })

  test('two attaches that come in the same moment: one owns the journal and is acknowledged, the other hears that it is stale', async () => {
    await using first = await startSite()
    await using agent = await new Agent(first.dir).listen()
    await using second = await startSite({ connect: () => dial(agent.path) })
    const sites = [first, second]
    const opened = await Promise.allSettled(sites.map(({ session }) => session.open({ reason: 'x', epoch: { reason: 'x' } })))
    const epochs = opened.map((one) => (one.status === 'fulfilled' ? one.value.epoch : 0))
    const winner = sites[epochs.indexOf(Math.max(...epochs))]
    await wholeCopy(winner)
    expect((await winner.session.end({ deadlineMs: 5000 })).durableSeq).toBe(agent.registry.get('site', '101')?.store.durableSeq)
    expect(agent.sockets.size).toBeLessThanOrEqual(2)
  })

  test('an agent that is not there, or refuses, rejects the attach; the next one works', async () => {
    let up = false
    await using site = await startSite({ connect: () => (up ? dial(join(site.dir, 'a')) : Promise.reject(new CdpError('UNREACHABLE', 'nobody listens'))) })
    await expect(site.session.open({ reason: 'x', epoch: { reason: 'x' } })).rejects.toMatchObject({ code: 'UNREACHABLE' })
    await using agent = await new Agent(site.dir).listen()
    up = true
    expect(await site.session.open({ reason: 'x', epoch: { reason: 'x' } })).toMatchObject({ epoch: 1 })
    expect(agent.sockets.size).toBe(1)
  })

  test('with the link down memory fills up to its bound, then capture lets go and the writer goes on', async () => {
    const budgetBytes = 4 * MiB
    await using site = await startSite({ budgetBytes })
    const agent = await new Agent(site.dir).listen()
    await site.session.open({ reason: 'x', epoch: { reason: 'x' } })
    await using client = await NbdClient.connect({ path: site.targetPath }, { exportName: 'scsi0' })
    await agent[Symbol.asyncDispose]()
    const letGo = site.until(({ is }) => is === 'letGo')
    let writes = 0
    const noise = Buffer.alloc(64 * 1024)
    for (let at = 0; at < noise.length; at += 4) noise.writeUInt32LE((Math.imul(at + 1, 0x9e37_79b1) ^ (at << 7)) >>> 0, at)
    const ended = (async () => {
      for (;; writes++) await client.write((writes % 64) * noise.length, noise)
    })()
    await expect(ended).rejects.toMatchObject({ code: 'CLOSED' })
    expect(await letGo).toMatchObject({ why: 'the link is down and the memory is full' })
    site.session.tick(0)
    const last = site.events.findLast((event) => event.is === 'stats')
    expect(last?.is === 'stats' && last.stats.peakBytes).toBeLessThan(budgetBytes + 2 * MiB)
    expect(writes).toBeGreaterThan(20)
  })

  test.each([[12, 'header'], [28 + 1_000, 'small payload'], [28 + 40_000, 'large payload']])('a request of which only %i bytes come (half a %s) makes it let go: the guest waits for its answer', async (sentBytes) => {
    await using site = await startSite({ slowAckMs: 50 })
    await using agent = await new Agent(site.dir).listen()
    await site.session.open({ reason: 'x', epoch: { reason: 'x' } })
    const socket = await dial(site.targetPath)
    const closed = once(socket, 'close')
    const handshake = new ClientHandshake({ exportName: 'scsi0' })
    const { promise: agreed, resolve } = Promise.withResolvers<void>()
    socket.on('data', (chunk) => {
      const { send, outcome } = handshake.push(chunk)
      for (const bytes of send) socket.write(bytes)
      if (outcome !== undefined) resolve()
    })
    await agreed
    const request = Buffer.alloc(28 + 65_536)
    request.writeUInt32BE(NBD_REQUEST_MAGIC, 0)
    request.writeUInt16BE(NBD_CMD_WRITE, 6)
    request.writeUInt32BE(sentBytes > 2_000 ? 65_536 : 4_096, 24)
    socket.write(request.subarray(0, sentBytes))
    const letGo = site.until(({ is }) => is === 'letGo')
    const ticks = setInterval(() => site.session.tick(0), 20)
    expect(await letGo).toMatchObject({ why: expect.stringMatching(/^capture stalled: for \d+ ms the rest of a request has not come$/) })
    await closed
    clearInterval(ticks)
    // Nothing of it was captured, and the stream to the agent goes on.
    expect((await site.session.captured()).bytes).toEqual({ scsi0: 0, scsi1: 0 })
    expect(agent.sockets.size).toBe(1)
  })

  /** Writes until `enough`, each write on the source first, and not faster than the spill's disk, which is not what is tested; a connection that ends is the end. */
  const writeUntil = async (site: Site, client: NbdClient, random: Random, enough: () => boolean): Promise<void> => {
    while (!enough()) {
      const data = randomBytes(512 * random.int(1, 200))
      const at = 512 * random.int(0, (DISK_BYTES - data.length) / 512)
      data.copy(site.sources[0].bytes, at)
      await client.write(at, data)
      for (let stats = lastStats(site); stats.heldBytes > site.budgetBytes * 0.75 && stats.spilledBytes < site.spillBytes - MiB; stats = lastStats(site)) await new Promise((resolve) => setImmediate(resolve))
    }
  }
  const lastStats = (site: Site): CaptureStats => {
    site.session.tick(0)
    const last = site.events.findLast((event) => event.is === 'stats')
    if (last?.is !== 'stats') throw new Error('no stats')
    return last.stats
  }
  const cutOf = (site: Site, id: string): ReturnType<Site['session']['cut']> => site.session.cut({ c: site.clock.cut(), mark: { id, vpg: 'shop', vms: ['101'], atUnixMs: 1, kind: 'automatic' } })

  test('an outage of many times the memory costs no checkpoint while the spill has room, and memory keeps its bound', async () => {
    const random = new Random(testSeed())
    process.stdout.write(`seed ${random.seed}\n`)
    const budgetBytes = 24 * MiB
    await using site = await startSite({ budgetBytes, spillBytes: 512 * MiB })
    const first = await new Agent(site.dir).listen()
    await site.session.open({ reason: 'x', epoch: { reason: 'x' } })
    const [client, ...others] = await Promise.all(KEYS.map((exportName) => NbdClient.connect({ path: site.targetPath }, { exportName })))
    await wholeCopy(site)
    await first[Symbol.asyncDispose]()
    const marks: string[] = []
    for (let n = 0; n < 10; n++) {
      const untilBytes = (n + 1) * 5 * MiB
      await writeUntil(site, client, random, () => lastStats(site).spilledBytes > untilBytes)
      expect(await cutOf(site, `c${n}`)).toHaveProperty('namedSeq')
      marks.push(`c${n}`)
    }
    expect(lastStats(site).peakBytes).toBeLessThan(budgetBytes + 2 * MiB)
    await using agent = await new Agent(site.dir).listen()
    await site.until((event) => event.is === 'link' && event.up)
    const { receivedSeq } = lastStats(site)
    while (lastStats(site).durableSeq < receivedSeq) await new Promise((resolve) => setImmediate(resolve))
    expect(agent.valid).toEqual(marks)
    for (const one of [client, ...others]) await one[Symbol.asyncDispose]()
    expect([lastStats(site).spilledBytes, site.events.some(({ is }) => is === 'letGo')]).toEqual([0, false])
    expect((await replayed(agent, site.dir, 0)).equals(site.sources[0].bytes)).toBe(true)
  })

  test('when the spill is full too, capture lets go and says so; what was captured arrives before the next attach begins', async () => {
    const random = new Random(testSeed())
    process.stdout.write(`seed ${random.seed}\n`)
    await using site = await startSite({ budgetBytes: 8 * MiB, spillBytes: 16 * MiB })
    const first = await new Agent(site.dir).listen()
    await site.session.open({ reason: 'x', epoch: { reason: 'x' } })
    const [client, ...others] = await Promise.all(KEYS.map((exportName) => NbdClient.connect({ path: site.targetPath }, { exportName })))
    await wholeCopy(site)
    await first[Symbol.asyncDispose]()
    await writeUntil(site, client, random, () => lastStats(site).spilledBytes > 8 * MiB)
    const contents = Buffer.from(site.sources[0].bytes)
    expect(await cutOf(site, 'before')).toHaveProperty('namedSeq')
    const letGo = site.until(({ is }) => is === 'letGo')
    await writeUntil(site, client, random, () => false).catch(() => undefined)
    expect(await letGo).toMatchObject({ why: expect.stringContaining('the spill has reached its limit') })
    await expect(site.session.open({ reason: 'again', epoch: { reason: 'again' } })).rejects.toMatchObject({ code: 'UNREACHABLE', message: expect.stringContaining('of captured history wait') })
    await expect(site.session.deliver()).rejects.toMatchObject({ code: 'UNREACHABLE', message: expect.stringContaining('of captured history wait') })
    await using agent = await new Agent(site.dir).listen()
    await site.until((event) => event.is === 'link' && event.up)
    expect(await site.session.open({ reason: 'again', epoch: { reason: 'again' } })).toMatchObject({ epoch: 2 })
    for (const one of [client, ...others]) await one[Symbol.asyncDispose]()
    expect(agent.valid).toEqual(['before'])
    const namedSeq = agent.catalogue.find('site', 'shop', 'before')?.namedSeqs['101'] ?? 0
    expect((await replayed(agent, site.dir, 0, namedSeq)).equals(contents)).toBe(true)
  })

  test('dispose ends a copy, a stream that tries to come back and held acknowledgements, twice is once', async () => {
    const site = await startSite()
    const agent = await new Agent(site.dir).listen()
    await site.session.open({ reason: 'x', epoch: { reason: 'x' } })
    for (const source of site.sources) source.bytes.fill(7)
    site.slowReads.gate = new Promise(() => undefined)
    const copy = wholeCopy(site)
    copy.catch(() => undefined)
    await agent[Symbol.asyncDispose]()
    await site.session[Symbol.asyncDispose]()
    await expect(copy).rejects.toMatchObject({ code: expect.stringMatching(/ABORTED|CLOSED/) })
    await site[Symbol.asyncDispose]()
  })
})


describe('a delta sync and an agent', () => {
  const fill = (site: Site, random: Random): void => {
    for (const source of site.sources) for (let n = 0; n < 10; n++) source.bytes.fill(random.int(1, 256), 4096 * random.int(0, 700), 4096 * random.int(700, 1024))
  }

  test('after a restart of QEMU only what differs is sent, under writes and with a link that breaks; checkpoints after it are the source', async () => {
    const random = new Random(testSeed())
    process.stdout.write(`seed ${random.seed}\n`)
    await using site = await startSite()
    await using agent = await new Agent(site.dir).listen()
    fill(site, random)
    expect(await site.session.open({ reason: 'first', epoch: { reason: 'first' } })).toMatchObject({ hashes: true, baseComplete: false })
    await wholeCopy(site)
    // Nobody captured this: QEMU died with it.
    for (const source of site.sources) {
      source.bytes.fill(0xab, 512 * 100, 512 * 101)
      source.bytes.fill(0, 2 * MiB, 2 * MiB + 4096)
    }
    expect(await site.session.open({ reason: 'again', epoch: { reason: 'again' } })).toMatchObject({ hashes: true, baseComplete: true, mirrorHasData: true })
    await comparison(site)
    expect(sentBytes(site)).toBe(4 * 64 * 1024)
    await comparison(site)
    expect(sentBytes(site)).toBe(0)
    for (const source of site.sources) source.bytes.fill(0xcd, MiB, MiB + 70_000)
    await site.session.open({ reason: 'third', epoch: { reason: 'third' } })
    const stop = await writers(site, random)
    const gate = Promise.withResolvers<void>()
    site.slowReads.gate = gate.promise
    const sync = comparison(site)
    const back = site.until((event) => event.is === 'link' && event.up)
    agent.cut()
    await back
    gate.resolve()
    expect((await sync).lastSeq).toBeGreaterThan(0)
    expect(sentBytes(site)).toBeLessThan(2 * DISK_BYTES)
    const { hashes } = agent
    await stop()
    await site.session.end({ deadlineMs: 5000 })
    for (const disk of [0, 1]) expect((await replayed(agent, site.dir, disk)).equals(site.sources[disk].bytes)).toBe(true)
    expect([agent.pins.list(), hashes.waitingCount]).toEqual([[], 0])
  })

  test('no checkpoint is cut in a forced sync; after it they are, again', async () => {
    await using site = await startSite()
    await using agent = await new Agent(site.dir).listen()
    fill(site, new Random(3))
    await site.session.open({ reason: 'x', epoch: { reason: 'x' } })
    await wholeCopy(site)
    const clients = await Promise.all(KEYS.map((exportName) => NbdClient.connect({ path: site.targetPath }, { exportName })))
    const cut = (id: string) => site.session.cut({ c: site.clock.cut(), mark: { id, vpg: 'shop', vms: ['101'], atUnixMs: Number(id), kind: 'automatic' } })
    expect(await cut('1')).toHaveProperty('namedSeq')
    const gate = Promise.withResolvers<void>()
    site.slowReads.gate = gate.promise
    const sync = comparison(site)
    expect(await cut('2')).toEqual({ refused: 'capture is not in step' })
    expect(await site.session.hold({ cutId: 'h', holdMs: 20 })).toEqual({ refused: 'capture is not in step' })
    gate.resolve()
    await sync
    expect(await cut('3')).toHaveProperty('namedSeq')
    for (const client of clients) await client[Symbol.asyncDispose]()
    await site.session.end({ deadlineMs: 5000 })
    expect(agent.valid).toEqual(['1', '3'])
  })

  test('a verify under writes finds nothing where nothing is wrong; one flipped byte of the mirror is found and healed', async () => {
    const random = new Random(testSeed())
    process.stdout.write(`seed ${random.seed}\n`)
    await using site = await startSite()
    await using agent = await new Agent(site.dir).listen()
    fill(site, random)
    await site.session.open({ reason: 'x', epoch: { reason: 'x' } })
    await expect(site.session.compare({ exportSocketPath: site.exportPath, disks: [], ranges: [], rateBytesPerSec: 0 })).rejects.toMatchObject({ code: 'CONFLICT' })
    await wholeCopy(site)
    const disks = KEYS.map((exportName, disk) => ({ disk, exportName, sizeBytes: DISK_BYTES }))
    const verify = async () => {
      await site.session.compare({ exportSocketPath: site.exportPath, disks, ranges: disks.map(({ disk }) => ({ disk, offsetBytes: 0, lengthBytes: DISK_BYTES })), rateBytesPerSec: 0 })
      return site.session.judge()
    }
    const connect = () => Promise.all(KEYS.map((exportName) => NbdClient.connect({ path: site.targetPath }, { exportName })))
    let clients = await connect()
    expect(await verify()).toEqual({ differences: [], undecided: [] })
    const flipAt = 64 * 1024 * random.int(10, 50)
    await using file = await open(join(site.dir, 'vms/site/101/mirror/1.raw'), 'r+')
    const byte = Buffer.alloc(1)
    await file.read(byte, 0, 1, flipAt + 77)
    await file.write(Buffer.of(byte[0] ^ 0x10), 0, 1, flipAt + 77)
    expect(await verify()).toEqual({ differences: [{ disk: 1, offsetBytes: flipAt, lengthBytes: 65_536 }], undecided: [] })
    await comparison(site)
    expect(sentBytes(site)).toBe(65_536)
    expect(await verify()).toEqual({ differences: [], undecided: [] })
    // Nothing is held for a comparison that is over.
    while (agent.pins.list().length > 0) await new Promise((resolve) => setImmediate(resolve))

    const stop = await writers(site, random)
    for (const client of clients) await client[Symbol.asyncDispose]()
    for (let round = 0; round < 3; round++) {
      await site.session.compare({ exportSocketPath: site.exportPath, disks, ranges: disks.map(({ disk }) => ({ disk, offsetBytes: 0, lengthBytes: DISK_BYTES })), rateBytesPerSec: 0 })
      // What is on the source and not captured yet is waited for, as a drain of QEMU does: each writer has one write under way at most.
      const { seq } = await site.session.captured()
      while ((await site.session.captured()).seq < seq + 40) await new Promise((resolve) => setTimeout(resolve, 1))
      expect((await site.session.judge()).differences).toEqual([])
    }
    await site.session.compare({ exportSocketPath: site.exportPath, disks, ranges: [], rateBytesPerSec: 0 })
    await stop()
    while (site.events.filter((event) => event.is === 'target' && event.state === 'closed').length < 4) await new Promise((resolve) => setImmediate(resolve))
    // Without connections from QEMU nothing can be said.
    await expect(site.session.judge()).rejects.toMatchObject({ code: 'ABORTED' })
    // Nor behind one that was lost: what the guest wrote meanwhile was not captured. A sync brings that in step.
    clients = await connect()
    await expect(verify()).rejects.toMatchObject({ code: 'CONFLICT' })
    await comparison(site)
    expect(await verify()).toEqual({ differences: [], undecided: [] })
    for (const client of clients) await client[Symbol.asyncDispose]()
    await site.session.end({ deadlineMs: 5000 })
    for (const disk of [0, 1]) expect((await replayed(agent, site.dir, disk)).equals(site.sources[disk].bytes)).toBe(true)
  })

  test('a preseeded first copy sends what differs, and is a base like any other', async () => {
    const random = new Random(testSeed())
    process.stdout.write(`seed ${random.seed}\n`)
    await using site = await startSite()
    fill(site, random)
    const vm = join(site.dir, 'vms/site/101')
    await mkdir(join(vm, 'preseed'), { recursive: true })
    const old = Buffer.from(site.sources[0].bytes)
    old.fill(0x77, 3 * MiB, 3 * MiB + 100)
    await writeFile(join(vm, 'preseed/scsi0.raw'), old)
    await using agent = await new Agent(site.dir).listen()
    expect(await site.session.open({ reason: 'x', epoch: { reason: 'x' } })).toMatchObject({ baseComplete: false, mirrorHasData: true })
    const stop = await writers(site, random)
    await comparison(site, 'initial')
    await stop()
    await site.session.end({ deadlineMs: 5000 })
    expect(sentBytes(site)).toBeLessThan(DISK_BYTES * 2)
    for (const disk of [0, 1]) expect((await replayed(agent, site.dir, disk)).equals(site.sources[disk].bytes)).toBe(true)
    await expect(readFile(join(vm, 'preseed/scsi0.raw'))).rejects.toMatchObject({ code: 'ENOENT' })
  })
})
