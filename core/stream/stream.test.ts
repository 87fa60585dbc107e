import { describe, expect, test } from '@jest/globals'
import {
  MAX_FRAME_MESSAGE_BYTES, MAX_OTHER_MESSAGE_BYTES, MessageParser, MessageType, STREAM_PROTOCOL, ackMessage, echoMessage, endMessage, frameMessageHeader, helloMessage, readAck, readEcho, readHello,
  readRefuse, readStateNews, readWelcome, refuseMessage, stateMessage, welcomeMessage,
} from './index.ts'
import type { Hello, Welcome } from './index.ts'

const hello: Hello = { protocol: STREAM_PROTOCOL, vm: '101', vpg: 'shop', vms: ['101', '102'], generation: 1, epoch: 0, disks: [{ disk: 0, key: 'scsi0', sizeBytes: 1 << 30 }], reason: 'the VM runs' }
const welcome: Welcome = { epoch: 2, generation: 1, durableSeq: 5, baseComplete: false, syncProgress: { 0: 4096 }, disks: hello.disks }
const bodyOf = (message: Buffer): Buffer => message.subarray(8)

const heard = (chunks: readonly Buffer[]): [number, string][] => {
  const messages: [number, string][] = []
  const parser = new MessageParser((type, body) => messages.push([type, body.toString('hex')]))
  for (const chunk of chunks) parser.push(chunk)
  return messages
}

describe('MessageParser', () => {
  const frame = Buffer.from('not looked into')
  const stream = Buffer.concat([helloMessage(hello), endMessage(), frameMessageHeader(frame.length), frame, ackMessage({ epoch: 1, durableSeq: 2 ** 40 }), frameMessageHeader(0), endMessage(), endMessage()])
  const whole = heard([stream])

  test('hears the same for every place in which the stream is cut, empty bodies and the last one included', () => {
    expect(whole.map(([type]) => type)).toEqual([MessageType.hello, MessageType.end, MessageType.frame, MessageType.ack, MessageType.frame, MessageType.end, MessageType.end])
    for (let cut = 0; cut <= stream.length; cut++) expect(heard([stream.subarray(0, cut), stream.subarray(cut)])).toEqual(whole)
    expect(heard(Array.from(stream, (byte) => Buffer.from([byte])))).toEqual(whole)
    expect(heard([Buffer.alloc(0), stream, Buffer.alloc(0)])).toEqual(whole)
  })

  test('gives each body to its receiver: the chunk may be used again', () => {
    const bodies: Buffer[] = []
    const chunk = Buffer.from(stream)
    new MessageParser((_type, body) => bodies.push(body)).push(chunk)
    chunk.fill(0)
    expect(bodies[2].toString()).toBe('not looked into')
  })

  test('refuses an unknown type and a body above its cap before it takes memory for it, and stays broken', () => {
    const header = (type: number, lengthBytes: number): Buffer => {
      const bytes = Buffer.alloc(8)
      bytes.writeUInt32LE(lengthBytes, 0)
      bytes[4] = type
      return bytes
    }
    for (const [type, lengthBytes] of [[0, 0], [12, 0], [MessageType.hashReply, MAX_OTHER_MESSAGE_BYTES + 1], [255, 1], [MessageType.frame, MAX_FRAME_MESSAGE_BYTES + 1], [MessageType.hello, MAX_OTHER_MESSAGE_BYTES + 1], [MessageType.ack, 0xffff_ffff]]) {
      const parser = new MessageParser(() => undefined)
      expect(() => parser.push(header(type, lengthBytes))).toThrow(expect.objectContaining({ code: 'STREAM_PROTOCOL' }))
      expect(() => parser.push(endMessage())).toThrow(expect.objectContaining({ code: 'STREAM_PROTOCOL' }))
    }
    expect(heard([header(MessageType.frame, MAX_FRAME_MESSAGE_BYTES)])).toEqual([])
  })
})

describe('messages', () => {
  test('arrive as they were', () => {
    expect(readHello(bodyOf(helloMessage(hello)))).toEqual(hello)
    expect(readWelcome(bodyOf(welcomeMessage(welcome)))).toEqual(welcome)
    expect(readAck(bodyOf(ackMessage({ epoch: 0xffff_ffff, durableSeq: Number.MAX_SAFE_INTEGER })))).toEqual({ epoch: 0xffff_ffff, durableSeq: Number.MAX_SAFE_INTEGER })
    expect(readEcho(bodyOf(echoMessage(MessageType.ping, 2 ** 52 + 1)))).toBe(2 ** 52 + 1)
    expect(readRefuse(bodyOf(refuseMessage({ code: 'IO', message: 'full', hint: 'make room' })))).toEqual({ code: 'IO', message: 'full', hint: 'make room' })
    expect(readRefuse(bodyOf(refuseMessage({ code: 'FENCED', message: 'taken over', generation: 2 })))).toEqual({ code: 'FENCED', message: 'taken over', generation: 2 })
    expect(readStateNews(bodyOf(stateMessage({ validCheckpoint: { id: 'a', atUnixMs: 1 } })))).toEqual({ validCheckpoint: { id: 'a', atUnixMs: 1 } })
    expect(readStateNews(bodyOf(stateMessage({ syncWanted: { why: 'damage' } })))).toEqual({ syncWanted: { why: 'damage' } })
    for (const bad of [{ syncWanted: {} }, { syncWanted: null }, { syncWanted: 'now' }, { validCheckpoint: null }]) expect(() => readStateNews(bodyOf(stateMessage(bad as never)))).toThrow('broken state')
  })

  test.each<[string, object]>([
    ['protocol 2', { protocol: 2 }], ['a VM that is a path', { vm: '../1', vms: ['../1'] }], ['an empty VM', { vm: '', vms: [''] }], ['a VM outside its group', { vm: '103' }], ['a group that is no list', { vms: '101' }],
    ['no generation', { generation: undefined }], ['generation 0', { generation: 0 }], ['half a generation', { generation: 1.5 }], ['a negative epoch', { epoch: -1 }], ['half an epoch', { epoch: 0.5 }], ['no disks', { disks: [] }], ['a disk of no size', { disks: [{ disk: 0, key: 'scsi0', sizeBytes: 0 }] }],
    ['a disk of half a sector', { disks: [{ disk: 0, key: 'scsi0', sizeBytes: 100 }] }], ['disk 65535', { disks: [{ disk: 0xffff, key: 'scsi0', sizeBytes: 512 }] }], ['a disk key that is a path', { disks: [{ disk: 0, key: '../a0', sizeBytes: 512 }] }],
    ['257 disks', { disks: Array.from({ length: 257 }, (_, disk) => ({ disk, key: `scsi${disk}`, sizeBytes: 512 })) }], ['a reason that is no text', { reason: 5 }],
  ])('a hello with %s is refused', (_what, change) => {
    expect(() => readHello(Buffer.from(JSON.stringify({ ...hello, ...change })))).toThrow(expect.objectContaining({ code: 'STREAM_PROTOCOL' }))
  })

  test('a broken welcome, acknowledgement, echo, refusal or news is refused', () => {
    const refused = expect.objectContaining({ code: 'STREAM_PROTOCOL' })
    for (const change of [{ epoch: 0 }, { epoch: '1' }, { generation: undefined }, { generation: 0 }, { generation: '2' }, { durableSeq: -1 }, { durableSeq: 2 ** 53 }, { baseComplete: 1 }, { syncProgress: null }, { syncProgress: { 0: '4096' } }, { syncProgress: { 0: -1 } }, { disks: {} }]) {
      expect(() => readWelcome(Buffer.from(JSON.stringify({ ...welcome, ...change })))).toThrow(refused)
    }
    for (const text of ['', '{', '[]', 'null', '5']) {
      for (const read of [readHello, readWelcome, readRefuse, readStateNews]) expect(() => read(Buffer.from(text))).toThrow(refused)
    }
    expect(() => readAck(Buffer.alloc(15))).toThrow(refused)
    expect(() => readAck(Buffer.alloc(16, 0xff))).toThrow(refused)
    expect(() => readEcho(Buffer.alloc(9))).toThrow(refused)
    for (const news of [{ validCheckpoint: null }, { validCheckpoint: { id: 1, atUnixMs: 1 } }, { validCheckpoint: { id: 'a', atUnixMs: 'now' } }]) expect(() => readStateNews(Buffer.from(JSON.stringify(news)))).toThrow(refused)
    expect(readStateNews(Buffer.from('{"later":1}'))).toEqual({})
  })

  test('a message above the cap is not sent', () => {
    expect(() => helloMessage({ ...hello, reason: 'x'.repeat(MAX_OTHER_MESSAGE_BYTES) })).toThrow(expect.objectContaining({ code: 'STREAM_PROTOCOL' }))
  })
})
