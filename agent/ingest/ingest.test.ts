import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { duplexPair } from 'node:stream'
import type { Duplex } from 'node:stream'
import { afterAll, afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { silentLogger } from '../../core/log/index.ts'
import { FLAG_DIRECT, FrameBuilder, RecordKind } from '../../core/record/index.ts'
import { MessageParser, MessageType, STREAM_PROTOCOL, echoMessage, endMessage, frameMessageHeader, helloMessage, readAck, readRefuse, readWelcome } from '../../core/stream/index.ts'
import { Catalogue } from '../checkpoint/index.ts'
import { SegmentSealer } from '../journal/index.ts'
import { Ingest, VmRegistry } from './index.ts'
import { StreamReceiver } from './stream-receiver.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())
const disks = [{ disk: 0, key: 'scsi0', sizeBytes: 1 << 20 }]
const hello = (epoch = 0, vm = '101') => helloMessage({ protocol: STREAM_PROTOCOL, vm, vpg: 'shop', vms: [vm], epoch, disks, reason: 'test' })

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
const open = (): VmRegistry => new VmRegistry({ directory: dir, catalogue, sealer, log: silentLogger, clock: { nowUnixMs: () => 1 }, onValid: () => undefined })
beforeEach(async () => {
  dir = await mkdtemp('/tmp/cdp-')
  catalogue = new Catalogue(':memory:')
  registry = open()
  ingest = new Ingest({ registry, catalogue, log: silentLogger })
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

  test('who connects and says nothing, or falls silent, is let go', async () => {
    const closed: string[] = []
    const quiet = (options: { helloDeadlineMs?: number; stallMs?: number }) =>
      new Peer((socket) => void new StreamReceiver({ socket, log: silentLogger, admit: async () => (await registry.open('site', '101')).store, onClosed: (_receiver, why) => closed.push(why), ...options }))
    quiet({ helloDeadlineMs: 10 })
    while (closed.length < 1) await new Promise((resolve) => setTimeout(resolve, 5))
    const silent = quiet({ stallMs: 40 })
    silent.socket.write(hello())
    while (closed.length < 2) await new Promise((resolve) => setTimeout(resolve, 5))
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
