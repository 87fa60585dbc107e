import { duplexPair } from 'node:stream'
import type { Duplex } from 'node:stream'
import { afterEach, describe, expect, test } from '@jest/globals'
import { CdpError } from '../../core/errors/index.ts'
import { FrameBuilder, RecordKind } from '../../core/record/index.ts'
import { MessageParser, MessageType, STREAM_PROTOCOL, ackMessage, echoMessage, frameMessageHeader, refuseMessage, stateMessage, welcomeMessage } from '../../core/stream/index.ts'
import { FrameQueue } from '../buffer/index.ts'
import { StreamSender } from './index.ts'
import type { StreamSenderOptions } from './index.ts'

const hello = { protocol: STREAM_PROTOCOL, vm: '101', vpg: 'shop', vms: ['101'], generation: 1, epoch: 0, disks: [{ disk: 0, key: 'scsi0', sizeBytes: 512 }], reason: 'test' }
const welcome = { epoch: 3, generation: 1, durableSeq: 0, baseComplete: true, syncProgress: {}, disks: hello.disks }

const frame = (seq: number, payloadBytes = 512) => {
  const builder = new FrameBuilder(Buffer.alloc(payloadBytes), 1)
  builder.reserveData(RecordKind.write, 0, 0, payloadBytes)
  return builder.seal({ firstSeq: seq, epoch: 3, atUnixMs: 1, flags: 0 })
}

const senders: StreamSender[] = []
afterEach(async () => {
  for (const sender of senders.splice(0)) await sender[Symbol.asyncDispose]()
})

const bench = (options: Partial<StreamSenderOptions> = {}) => {
  const [ours, theirs] = duplexPair({ highWaterMark: 16 * 1024 })
  const queue = new FrameQueue()
  const durable: number[] = []
  const lost: CdpError[] = []
  const news: unknown[] = []
  const heard: { type: MessageType; body: Buffer }[] = []
  const heardWaiters: (() => void)[] = []
  const parser = new MessageParser((type, body) => {
    heard.push({ type, body })
    for (const wake of heardWaiters.splice(0)) wake()
  })
  const listen = (): void => void theirs.on('data', (chunk: Buffer) => parser.push(chunk))
  const sender = new StreamSender({ queue, connect: async () => ours, onDurable: (seq) => durable.push(seq), onNews: (one) => news.push(one), onLost: (error) => lost.push(error), ...options })
  senders.push(sender)
  const until = async (done: () => boolean): Promise<void> => {
    while (!done()) await new Promise<void>((resolve) => setImmediate(resolve))
  }
  return { ours, theirs, queue, durable, lost, news, heard, listen, sender, until }
}

describe('StreamSender', () => {
  test.each([['FENCED', 2], ['GENERATION_AHEAD', 1]] as const)('%s: what the agent refuses so, and what its welcome says between the lines, is the same error', async (code, held) => {
    const ours = { ...hello, generation: code === 'FENCED' ? 1 : 2 }
    for (const answer of [refuseMessage({ code, message: 'of another generation', hint: 'decide', generation: held }), welcomeMessage({ ...welcome, generation: held })]) {
      const { theirs, sender, lost, queue, heard, listen, until } = bench()
      listen()
      queue.push(frame(1))
      const opened = sender.open(ours)
      theirs.write(answer)
      await expect(opened).rejects.toMatchObject({ code, context: { generation: held }, hint: expect.any(String) })
      sender.pump()
      await until(() => theirs.readableEnded || theirs.destroyed || heard.length > 0)
      // Nothing of ours followed the hello.
      expect(heard.every(({ type }) => type === MessageType.hello)).toBe(true)
      expect(lost).toEqual([])
    }
  })

  test('says hello, sends frames in order as whole messages, hears what is durable and answers pings', async () => {
    const { theirs, queue, durable, heard, listen, sender, news, until, lost } = bench()
    listen()
    const opened = sender.open(hello)
    await until(() => heard.length === 1)
    sender.pump()
    theirs.write(welcomeMessage(welcome))
    expect(await opened).toEqual(welcome)
    for (let seq = 1; seq <= 3; seq++) queue.push(frame(seq))
    sender.pump()
    await until(() => heard.length === 4)
    expect(heard.map(({ type }) => type)).toEqual([MessageType.hello, MessageType.frame, MessageType.frame, MessageType.frame])
    const third = frame(3)
    expect(heard[3].body.equals(Buffer.concat([third.head, third.payload]))).toBe(true)
    theirs.write(ackMessage({ epoch: 2, durableSeq: 9 }))
    theirs.write(ackMessage({ epoch: 3, durableSeq: 2 }))
    theirs.write(stateMessage({ validCheckpoint: { id: 'c', atUnixMs: 5 } }))
    theirs.write(echoMessage(MessageType.ping, 77))
    await until(() => heard.length === 5)
    expect([durable, news, heard[4].type]).toEqual([[2], [{ validCheckpoint: { id: 'c', atUnixMs: 5 } }], MessageType.pong])
    sender.end()
    await until(() => heard.length === 6)
    expect(heard[5].type).toBe(MessageType.end)
    expect(lost).toEqual([])
  })

  test('what ends the stream in the turn of its welcome is not forgotten', async () => {
    for (const ending of [refuseMessage({ code: 'STALE_EPOCH', message: 'a newer attach' }), frameMessageHeader(0), Buffer.from([0, 0, 0, 0, 99, 0, 0, 0])]) {
      const { theirs, sender, listen, until, heard } = bench()
      listen()
      const opened = sender.open(hello)
      opened.catch(() => undefined)
      await until(() => heard.length === 1)
      theirs.write(Buffer.concat([welcomeMessage(welcome), ending]))
      await expect(opened).rejects.toMatchObject({ code: expect.stringMatching(/STALE_EPOCH|STREAM_PROTOCOL/) })
    }
  })

  test.each([['STALE_EPOCH', 'STALE_EPOCH'], ['IO', 'STREAM_REFUSED'], ['CONFLICT', 'STREAM_REFUSED']])('a refusal with %s rejects the hello with %s, its message and hint', async (code, expected) => {
    const { theirs, sender } = bench()
    theirs.resume()
    const opened = sender.open(hello)
    theirs.write(refuseMessage({ code, message: 'no', hint: 'do this' }))
    await expect(opened).rejects.toMatchObject({ code: expected, message: 'no', hint: 'do this' })
  })

  test('a broken, silent or closed agent rejects the hello', async () => {
    const broken = bench()
    broken.theirs.resume()
    const one = broken.sender.open(hello)
    broken.theirs.write(Buffer.from([0, 0, 0, 0, 99, 0, 0, 0]))
    await expect(one).rejects.toMatchObject({ code: 'STREAM_PROTOCOL' })
    const silent = bench({ welcomeDeadlineMs: 10 })
    silent.theirs.resume()
    await expect(silent.sender.open(hello)).rejects.toMatchObject({ code: 'TIMEOUT' })
    const closed = bench()
    const two = closed.sender.open(hello)
    closed.ours.destroy()
    await expect(two).rejects.toMatchObject({ code: 'CLOSED' })
    expect([broken.lost, silent.lost, closed.lost]).toEqual([[], [], []])
    await expect(bench({ connect: () => Promise.reject(new CdpError('UNREACHABLE', 'nobody')) }).sender.open(hello)).rejects.toMatchObject({ code: 'UNREACHABLE' })
  })

  test('a connection that breaks later is lost once, and nothing is sent any more', async () => {
    const { theirs, sender, lost, until, queue, ours } = bench()
    theirs.resume()
    const opened = sender.open(hello)
    theirs.write(welcomeMessage(welcome))
    await opened
    ours.destroy(new Error('reset'))
    await until(() => lost.length > 0)
    queue.push(frame(1))
    sender.pump()
    sender.end()
    await new Promise((resolve) => setImmediate(resolve))
    expect(lost.map(({ code }) => code)).toEqual(['CLOSED'])
    expect(queue.next()?.firstSeq).toBe(1)
  })

  test('an agent that says nothing for too long is given up', async () => {
    const { theirs, sender, lost, until } = bench({ stallMs: 40 })
    theirs.resume()
    const opened = sender.open(hello)
    theirs.write(welcomeMessage(welcome))
    await opened
    await until(() => lost.length > 0)
    expect(lost[0].code).toBe('TIMEOUT')
  })

  test('an agent that does not read holds the sender back; what it has not taken stays in the queue', async () => {
    const { theirs, sender, queue, until, listen, heard, ours } = bench()
    const opened = sender.open(hello)
    theirs.write(welcomeMessage(welcome))
    await opened
    const payloadBytes = 256 * 1024
    for (let seq = 1; seq <= 40; seq++) {
      queue.push(frame(seq, payloadBytes))
      sender.pump()
    }
    expect(ours.writableLength).toBeLessThan(2 * 1024 * 1024 + 2 * payloadBytes)
    listen()
    await until(() => heard.length === 41)
    expect(heard.slice(1).map(({ body }) => body.readUInt32LE(8))).toEqual(Array.from({ length: 40 }, (_, at) => at + 1))
  })

  test('given up while it connects or waits, it rejects, and the socket is gone; disposing twice is once', async () => {
    const connecting = Promise.withResolvers<Duplex>()
    const early = bench({ connect: () => connecting.promise })
    const one = early.sender.open(hello)
    await early.sender[Symbol.asyncDispose]()
    connecting.resolve(early.ours)
    await expect(one).rejects.toMatchObject({ code: 'ABORTED' })
    expect(early.ours.destroyed).toBe(true)
    const late = bench()
    late.listen()
    const two = late.sender.open(hello)
    two.catch(() => undefined)
    await late.until(() => late.heard.length === 1)
    await late.sender[Symbol.asyncDispose]()
    await late.sender[Symbol.asyncDispose]()
    await expect(two).rejects.toMatchObject({ code: 'ABORTED' })
    expect([late.ours.destroyed, late.lost]).toEqual([true, []])
  })

  test('a hello that is too large is refused before a connection is made', async () => {
    let connected = 0
    const { sender, ours } = bench({ connect: async () => (connected++, ours) })
    await expect(sender.open({ ...hello, reason: 'x'.repeat(70_000) })).rejects.toMatchObject({ code: 'STREAM_PROTOCOL' })
    expect(connected).toBe(0)
  })
})
