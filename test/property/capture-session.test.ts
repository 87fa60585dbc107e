import { createServer, connect } from 'node:net'
import type { Server, Socket } from 'node:net'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from '@jest/globals'
import { Catalogue } from '../../agent/checkpoint/index.ts'
import { Ingest, VmRegistry } from '../../agent/ingest/index.ts'
import { SegmentSealer } from '../../agent/journal/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { MemoryExport, NbdClient, NbdServer } from '../../core/nbd/index.ts'
import { hasData, hasRange } from '../../core/record/index.ts'
import { CaptureSession, GroupClock } from '../../plugin/capture/index.ts'
import type { CaptureEvent } from '../../plugin/capture/index.ts'
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
  readonly valid: string[] = []
  readonly sockets = new Set<Socket>()
  readonly path: string
  #server: Server

  constructor(dir: string) {
    this.path = join(dir, 'a')
    this.catalogue = new Catalogue(':memory:')
    this.registry = new VmRegistry({
      directory: join(dir, 'vms'), catalogue: this.catalogue, sealer, log: silentLogger, clock: { nowUnixMs: Date.now }, limits: { segmentBytes: 2 * MiB, segmentRecords: 1024 },
      onValid: (siteId, vpg, one) => {
        this.valid.push(one.id)
        this.ingest.tellValid(siteId, vpg, one)
      },
    })
    this.ingest = new Ingest({ registry: this.registry, catalogue: this.catalogue, log: silentLogger })
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

type Site = AsyncDisposable & { dir: string; session: CaptureSession; events: CaptureEvent[]; until: (is: (event: CaptureEvent) => boolean) => Promise<CaptureEvent>; clock: GroupClock; sources: MemoryExport[]; exportPath: string; targetPath: string; slowReads: { gate: Promise<void> | undefined } }

const startSite = async (options: { connect?: () => Promise<Socket>; budgetBytes?: number } = {}): Promise<Site> => {
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
    slowAck: { p99Ms: 1e9, maxMs: 1e9 }, clock, connect: options.connect ?? (() => dial(join(dir, 'a'))), nowUnixMs: Date.now, random: () => 0,
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
    dir, session, events, clock, sources, exportPath, targetPath, slowReads,
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

/** What the agent holds of a disk: its mirror, then every record of the journal. */
const replayed = async (agent: Agent, dir: string, disk: number): Promise<Buffer> => {
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
        if (table.disk(index) !== disk || !hasRange(kind)) continue
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

