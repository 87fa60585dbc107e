import { once } from 'node:events'
import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { duplexPair } from 'node:stream'
import type { Duplex } from 'node:stream'
import { afterAll, afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { silentLogger } from '../../core/log/index.ts'
import { FLAG_DIRECT, FrameBuilder, RecordKind } from '../../core/record/index.ts'
import { MessageParser, MessageType, STREAM_PROTOCOL, echoMessage, endMessage, frameMessageHeader, helloMessage, readAck, readRefuse, readWelcome } from '../../core/stream/index.ts'
import { Catalogue } from '../checkpoint/index.ts'
import { SegmentSealer } from '../journal/index.ts'
import { GroupGenerations, Ingest, VmRegistry } from './index.ts'
import { StreamReceiver } from './stream-receiver.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())
const disks = [{ disk: 0, key: 'scsi0', sizeBytes: 1 << 20 }]
const hello = (epoch = 0, vm = '101', generation = 1) => helloMessage({ protocol: STREAM_PROTOCOL, vm, vpg: 'shop', vms: [vm], generation, epoch, disks, reason: 'test' })

const directFrame = (firstSeq: number, epoch: number): Buffer => {
  const builder = new FrameBuilder(Buffer.alloc(4096), 1)
  builder.payload.fill(firstSeq, builder.reserveData(RecordKind.write, 0, 0, 4096), 4096)
  const { head, payload, lengthBytes } = builder.seal({ firstSeq, epoch, atUnixMs: 1, flags: FLAG_DIRECT })
  return Buffer.concat([frameMessageHeader(lengthBytes), head, payload])
}

let dir = ''
let catalogue: Catalogue
let registry: VmRegistry
let ingest: Ingest
let disowned: string[] = []
const makeIngest = (): Ingest =>
  new Ingest({ registry, catalogue, generations: new GroupGenerations(join(dir, 'generations'), () => 1), log: silentLogger, onDisowned: (site, { vm }, { code }) => void disowned.push(`${site} ${vm} ${code}`) })
const open = (): VmRegistry => new VmRegistry({ directory: dir, catalogue, sealer, log: silentLogger, clock: { nowUnixMs: () => 1 }, onValid: () => undefined })
beforeEach(async () => {
  dir = await mkdtemp('/tmp/cdp-')
  catalogue = new Catalogue(':memory:')
  registry = open()
  disowned = []
  ingest = makeIngest()
})
afterEach(async () => {
  ingest[Symbol.dispose]()
  await registry[Symbol.asyncDispose]()
  catalogue[Symbol.dispose]()
  await rm(dir, { recursive: true, force: true })
})

class Peer {
  readonly socket: Duplex
  readonly heard: { type: MessageType; body: Buffer }[] = []
  ended = false

  constructor(take: (socket: Duplex) => void) {
    const [ours, theirs] = duplexPair()
    this.socket = ours
    const parser = new MessageParser((type, body) => this.heard.push({ type, body }))
    ours.on('data', (chunk: Buffer) => parser.push(chunk))
    ours.on('end', () => (this.ended = true))
    ours.on('error', () => undefined)
    take(theirs)
  }

  async hears(type: MessageType): Promise<Buffer> {
    for (;;) {
      const at = this.heard.findIndex((one) => one.type === type)
      if (at >= 0) return this.heard.splice(at, 1)[0].body
      await new Promise((resolve) => setImmediate(resolve))
    }
  }

  async refusal(): Promise<string> {
    return readRefuse(await this.hears(MessageType.refuse)).code
  }
}
const peer = (): Peer => new Peer((socket) => ingest.take(socket, 'site'))

describe('Ingest', () => {
  test('gives an attach its epoch, acknowledges what is durable, skips what it holds after a reconnect', async () => {
    const first = peer()
    first.socket.write(hello())
    expect(readWelcome(await first.hears(MessageType.welcome))).toMatchObject({ epoch: 1, durableSeq: 0, baseComplete: false, disks })
    expect(ingest.isConnected('site', '101')).toBe(true)
    first.socket.write(Buffer.concat([directFrame(1, 1), echoMessage(MessageType.ping, 9)]))
    expect(readAck(await first.hears(MessageType.ack))).toEqual({ epoch: 1, durableSeq: 1 })
    await first.hears(MessageType.pong)
    const second = peer()
    second.socket.write(hello(1))
    expect(readWelcome(await second.hears(MessageType.welcome))).toMatchObject({ epoch: 1, durableSeq: 1 })
    second.socket.write(Buffer.concat([directFrame(1, 1), directFrame(2, 1), endMessage()]))
    expect(readAck(await second.hears(MessageType.ack))).toEqual({ epoch: 1, durableSeq: 2 })
    expect(ingest.isSiteConnected('site')).toBe(true)
  })

  test('the newest attach owns the journal: older streams hear that they are stale, and its acknowledgements are not lost with them', async () => {
    const peers = [peer(), peer(), peer()]
    for (const one of peers) one.socket.write(hello())
    // The last to say hello: whichever order the disk answers in, it is the newest.
    const last = 2
    const { epoch } = readWelcome(await peers[last].hears(MessageType.welcome))
    expect(epoch).toBe(registry.get('site', '101')?.store.epoch)
    for (const one of peers.slice(0, last)) expect(await one.refusal()).toBe('STALE_EPOCH')
    peers[last].socket.write(directFrame(1, epoch))
    expect(readAck(await peers[last].hears(MessageType.ack))).toEqual({ epoch, durableSeq: 1 })
    const stale = peer()
    stale.socket.write(hello(epoch + 5))
    expect(await stale.refusal()).toBe('STALE_EPOCH')
    expect(ingest.isConnected('site', '101')).toBe(true)
    peers[last].socket.write(directFrame(2, epoch))
    expect(readAck(await peers[last].hears(MessageType.ack))).toEqual({ epoch, durableSeq: 2 })
  })

  test.each<[string, Buffer, string]>([
    ['bytes that are no message', Buffer.alloc(8, 0xff), 'STREAM_PROTOCOL'],
    ['a frame before the hello', directFrame(1, 1), 'STREAM_PROTOCOL'],
    ['two hellos', Buffer.concat([hello(), hello()]), 'STREAM_PROTOCOL'],
    ['a message that is the agent\'s', Buffer.from([0, 0, 0, 0, MessageType.welcome, 0, 0, 0]), 'STREAM_PROTOCOL'],
    ['an epoch that was never given', hello(7), 'STALE_EPOCH'],
  ])('%s is refused with its reason, and nothing is left of the stream', async (_what, bytes, code) => {
    const one = peer()
    one.socket.write(bytes)
    expect(await one.refusal()).toBe(code)
    while (!one.ended) await once(one.socket, 'end')
    while (ingest.isConnected('site', '101')) await new Promise((resolve) => setImmediate(resolve))
  })

  test('a gap and a damaged frame are refused; the same attach may come back', async () => {
    const first = peer()
    first.socket.write(hello())
    await first.hears(MessageType.welcome)
    first.socket.write(directFrame(5, 1))
    expect(await first.refusal()).toBe('STREAM_PROTOCOL')
    const second = peer()
    second.socket.write(hello(1))
    await second.hears(MessageType.welcome)
    const damaged = directFrame(1, 1)
    damaged[200] ^= 1
    second.socket.write(damaged)
    expect(await second.refusal()).toBe('CHECKSUM')
    const third = peer()
    third.socket.write(Buffer.concat([hello(1)]))
    expect(readWelcome(await third.hears(MessageType.welcome)).durableSeq).toBe(0)
  })

  describe('generations', () => {
    const refusalOf = async (one: Peer) => readRefuse(await one.hears(MessageType.refuse))

    test('a group that is handed over ends the streams of the generation before, and takes nothing more of it, not even what the stream has sent already', async () => {
      const [old, other] = [peer(), peer()]
      old.socket.write(hello())
      other.socket.write(helloMessage({ protocol: STREAM_PROTOCOL, vm: '200', vpg: 'web', vms: ['200'], generation: 1, epoch: 0, disks, reason: 'test' }))
      expect(readWelcome(await old.hears(MessageType.welcome))).toMatchObject({ epoch: 1, generation: 1 })
      await other.hears(MessageType.welcome)
      old.socket.write(directFrame(1, 1))
      await old.hears(MessageType.ack)
      const raising = ingest.raiseGeneration('site', 'shop', 'failed over')
      await raising
      old.socket.write(directFrame(2, 1))
      expect(await refusalOf(old)).toMatchObject({ code: 'FENCED', generation: 2, message: expect.stringContaining('failed over'), hint: expect.any(String) })
      while (!old.ended) await once(old.socket, 'end')
      await registry.get('site', '101')?.store.flush()
      expect(registry.get('site', '101')?.store.durableSeq).toBe(1)
      // The neighbour is not touched.
      other.socket.write(directFrame(1, 1))
      expect(readAck(await other.hears(MessageType.ack))).toEqual({ epoch: 1, durableSeq: 1 })
      expect(ingest.isConnected('site', '200')).toBe(true)
    })

    test.each([
      [1, 'FENCED', 'a new attach', 0], [1, 'FENCED', 'a reconnect', 1], [4, 'GENERATION_AHEAD', 'a new attach', 0], [3, undefined, 'a new attach', 0],
    ] as const)('of a group in generation 3 a stream of %i is answered by %s (%s), also by an agent that was started again', async (generation, code, _what, epoch) => {
      const first = peer()
      first.socket.write(hello())
      await first.hears(MessageType.welcome)
      await ingest.raiseGeneration('site', 'shop', 'failed over')
      await ingest.raiseGeneration('site', 'shop', 'failed over again')
      for (const again of [false, true]) {
        if (again) {
          ingest[Symbol.dispose]()
          ingest = makeIngest()
        }
        const before = registry.get('site', '101')?.store.epoch
        const one = peer()
        one.socket.write(hello(epoch, '101', generation))
        if (code === undefined) {
          expect(readWelcome(await one.hears(MessageType.welcome)).generation).toBe(3)
          continue
        }
        expect(await refusalOf(one)).toMatchObject({ code, generation: 3 })
        // It was asked for nothing: no epoch was given, nobody's stream had to make room.
        expect(registry.get('site', '101')?.store.epoch).toBe(before)
        expect(disowned.at(-1)).toBe(`site 101 ${code}`)
      }
    })

    test('a stream that says hello while the group is handed over is ended, whichever comes first', async () => {
      for (let round = 0; round < 20; round++) {
        const one = peer()
        one.socket.write(hello(0, '101', 1 + round))
        const turns = round % 5
        for (let turn = 0; turn < turns; turn++) await new Promise((resolve) => setImmediate(resolve))
        await ingest.raiseGeneration('site', 'shop', 'failed over')
        expect(await refusalOf(one)).toMatchObject({ code: 'FENCED', generation: 2 + round })
      }
    })

    test('what does not say who owns the group lets nobody in, and no store is made for who is refused', async () => {
      await mkdir(join(dir, 'generations/site'), { recursive: true })
      for (const text of ['{', '{}', '{"format":1}', '{"format":1,"generation":0}', '{"format":2,"generation":1}', '{"format":1,"generation":1.5}', '[]']) {
        await writeFile(join(dir, 'generations/site/shop.json'), text)
        const one = peer()
        one.socket.write(hello())
        expect(await one.refusal()).toBe('FORMAT')
        await expect(ingest.raiseGeneration('site', 'shop', 'failed over')).rejects.toMatchObject({ code: 'FORMAT' })
      }
      expect(registry.list()).toEqual([])
      await writeFile(join(dir, 'generations/site/shop.json'), '{"format":1,"generation":5,"why":"x","raisedAtUnixMs":9}')
      expect(await ingest.raiseGeneration('site', 'shop', 'failed over')).toEqual({ generation: 6, why: 'failed over', raisedAtUnixMs: 1 })
    })

    test('a handover that cannot be written is none', async () => {
      const one = peer()
      one.socket.write(hello())
      await one.hears(MessageType.welcome)
      // In the place of the directory: no file can be made below it, by whomever.
      await writeFile(join(dir, 'generations'), '')
      await expect(ingest.raiseGeneration('site', 'shop', 'failed over')).rejects.toBeDefined()
      one.socket.write(directFrame(1, 1))
      expect(readAck(await one.hears(MessageType.ack))).toEqual({ epoch: 1, durableSeq: 1 })
    })
  })

  test('who connects and says nothing, or falls silent, is let go', async () => {
    const closed: string[] = []
    const ends = [Promise.withResolvers<void>(), Promise.withResolvers<void>()]
    const quiet = (options: { helloDeadlineMs?: number; stallMs?: number }) =>
      new Peer((socket) => void new StreamReceiver({ socket, log: silentLogger, admit: async () => ({ ...(await registry.open('site', '101')), generation: 1 }), onClosed: (_receiver, why) => ends[closed.push(why) - 1].resolve(), ...options }))
    quiet({ helloDeadlineMs: 10 })
    await ends[0].promise
    const silent = quiet({ stallMs: 40 })
    silent.socket.write(hello())
    await ends[1].promise
    expect(closed).toEqual(['no hello came', 'the protected site has been silent'])
  })
})

describe('VmRegistry', () => {
  test('a journal that holds less than was acknowledged is refused each time, and never served', async () => {
    await registry.open('site', '101')
    await registry[Symbol.asyncDispose]()
    catalogue.noteSeen('site', '101', 50)
    for (let time = 0; time < 2; time++) await expect(registry.open('site', '101')).rejects.toMatchObject({ code: 'JOURNAL_DAMAGED', hint: expect.any(String) })
    expect(registry.get('site', '101')).toBeUndefined()
  })

  test('stores are opened once for callers at the same time, found again by openAll, and strange files are stepped over', async () => {
    const [one, other] = await Promise.all([registry.open('site', '101'), registry.open('site', '101')])
    expect(one).toBe(other)
    await registry[Symbol.asyncDispose]()
    const again = open()
    await again.openAll()
    expect(again.list().map(({ siteId, vm }) => [siteId, vm])).toEqual([['site', '101']])
    expect(join(dir, 'site', '101')).toBe(again.get('site', '101')?.store.directory)
    await again[Symbol.asyncDispose]()
  })
})
