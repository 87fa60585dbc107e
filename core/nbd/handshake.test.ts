import { describe, expect, test } from '@jest/globals'
import { ClientHandshake, type ClientHandshakeOptions, type ClientSession } from './client-handshake.ts'
import * as nbd from './constants.ts'
import { encodeOption, encodeString } from './option-codec.ts'
import { randomChunks, seededIntegers } from './seeded.ts'
import { ServerHandshake, type HandshakeExport, type HandshakeOptions, type HandshakeStep } from './server-handshake.ts'

const disk: HandshakeExport = {
  name: 'disk', sizeBytes: 2 ** 40 + 512, transmissionFlags: nbd.NBD_FLAG_HAS_FLAGS | nbd.NBD_FLAG_SEND_FUA, description: 'a disk',
  blockSize: { minBytes: 512, preferredBytes: 4096, maxBytes: 1 << 20 }, metaContexts: [nbd.BASE_ALLOCATION, 'qemu:dirty-bitmap:a', 'qemu:dirty-bitmap:b'],
}
const plain: HandshakeOptions = { findExport: (name) => (name === 'disk' ? disk : undefined), listExports: () => [disk, { name: 'other' }] }

const u16 = (value: number): Buffer => Buffer.from([value >> 8, value & 255])
const u32 = (value: number): Buffer => Buffer.from([value >>> 24, (value >> 16) & 255, (value >> 8) & 255, value & 255])
const FIXED = u32(nbd.NBD_FLAG_C_FIXED_NEWSTYLE | nbd.NBD_FLAG_C_NO_ZEROES)
const goOf = (name: string, ...infos: number[]): Buffer => encodeOption(nbd.NBD_OPT_GO, [encodeString(name), u16(infos.length), ...infos.map(u16)])

type Reply = { option: number; type: number; payload: Buffer }
const repliesIn = (bytes: Buffer): Reply[] => {
  const replies: Reply[] = []
  for (let at = 0; at < bytes.length; ) {
    const lengthBytes = bytes.readUInt32BE(at + 16)
    replies.push({ option: bytes.readUInt32BE(at + 8), type: bytes.readUInt32BE(at + 12), payload: bytes.subarray(at + 20, at + 20 + lengthBytes) })
    at += 20 + lengthBytes
  }
  return replies
}

/** Pushes everything at once. */
const talk = (options: HandshakeOptions, ...sent: Buffer[]): HandshakeStep & { replies: Reply[] } => {
  const step = new ServerHandshake(options).push(Buffer.concat([FIXED, ...sent]))
  return { ...step, replies: repliesIn(Buffer.concat(step.send)) }
}

/** Client and server talk to each other, every message cut into pieces. */
const converse = (
  serverOptions: HandshakeOptions, clientOptions: ClientHandshakeOptions, below: (limit: number) => number,
): { session: ClientSession; server: HandshakeStep['outcome'] } => {
  const server = new ServerHandshake(serverOptions)
  const client = new ClientHandshake(clientOptions)
  let toClient: Buffer[] = [server.greeting()]
  let session: ClientSession | undefined
  let outcome: HandshakeStep['outcome']
  for (let turn = 0; turn < 10 && !session; turn++) {
    const toServer: Buffer[] = []
    for (const chunk of randomChunks(Buffer.concat(toClient), below, 30)) {
      const step = client.push(chunk)
      toServer.push(...step.send)
      session = step.outcome?.session
    }
    toClient = []
    for (const chunk of randomChunks(Buffer.concat(toServer), below, 30)) {
      const step = server.push(chunk)
      toClient.push(...step.send)
      outcome = step.outcome
    }
  }
  if (!session) throw new RangeError('the handshake does not end')
  return { session, server: outcome }
}

describe('handshake of our client with our server', () => {
  test('agree on the same session for any chunking, with and without structured replies', () => {
    const seed = Date.now() >>> 0
    console.log(`seed ${seed}`)
    const below = seededIntegers(seed)
    for (let round = 0; round < 50; round++) {
      const full = converse(plain, { exportName: 'disk', metaContexts: ['qemu:dirty-bitmap:b', 'nothing:like-it', nbd.BASE_ALLOCATION] }, below)
      expect(full.session).toEqual({
        sizeBytes: disk.sizeBytes, transmissionFlags: disk.transmissionFlags | nbd.NBD_FLAG_SEND_DF, structuredReplies: true, blockSize: disk.blockSize,
        metaContexts: new Map([[1, nbd.BASE_ALLOCATION], [2, 'qemu:dirty-bitmap:b']]),
      })
      expect(full.server).toEqual({
        is: 'transmission', rest: Buffer.alloc(0),
        session: { exportName: 'disk', structuredReplies: true, metaContexts: [nbd.BASE_ALLOCATION, 'qemu:dirty-bitmap:b'] },
      })
      const simples = [
        converse({ ...plain, structuredReplies: false }, { exportName: 'disk', metaContexts: [nbd.BASE_ALLOCATION] }, below),
        converse(plain, { exportName: 'disk', structuredReplies: false }, below),
      ]
      for (const simple of simples) {
        expect(simple.session).toEqual({
          sizeBytes: disk.sizeBytes, transmissionFlags: disk.transmissionFlags, structuredReplies: false, blockSize: disk.blockSize, metaContexts: new Map(),
        })
      }
    }
  })

  test('an unknown export is refused with the name in the message', () => {
    const refusal = { code: 'NBD_REFUSED', message: expect.stringContaining("'nope' does not exist") as unknown }
    expect(() => converse(plain, { exportName: 'nope' }, () => 0)).toThrow(expect.objectContaining(refusal))
  })
})

describe('ServerHandshake', () => {
  test('LIST names all exports with their descriptions', () => {
    const { replies, events } = talk(plain, encodeOption(nbd.NBD_OPT_LIST))
    expect(replies.map((reply) => [reply.type, reply.payload.toString('latin1')])).toEqual([
      [nbd.NBD_REP_SERVER, '\0\0\0\x04diska disk'], [nbd.NBD_REP_SERVER, '\0\0\0\x05other'], [nbd.NBD_REP_ACK, ''],
    ])
    expect(events).toEqual([{ is: 'list' }])
  })

  test('INFO tells without entering, GO enters and hands on what follows', () => {
    const info = encodeOption(nbd.NBD_OPT_INFO, [encodeString('disk'), u16(2), u16(nbd.NBD_INFO_NAME), u16(nbd.NBD_INFO_DESCRIPTION)])
    const { replies, outcome, events } = talk(plain, info, goOf('disk'), Buffer.from('and more'))
    expect(replies.map((reply) => [reply.option, reply.type, reply.payload.length >= 2 ? reply.payload.readUInt16BE(0) : -1])).toEqual([
      [nbd.NBD_OPT_INFO, nbd.NBD_REP_INFO, nbd.NBD_INFO_EXPORT], [nbd.NBD_OPT_INFO, nbd.NBD_REP_INFO, nbd.NBD_INFO_BLOCK_SIZE],
      [nbd.NBD_OPT_INFO, nbd.NBD_REP_INFO, nbd.NBD_INFO_NAME], [nbd.NBD_OPT_INFO, nbd.NBD_REP_INFO, nbd.NBD_INFO_DESCRIPTION],
      [nbd.NBD_OPT_INFO, nbd.NBD_REP_ACK, -1],
      [nbd.NBD_OPT_GO, nbd.NBD_REP_INFO, nbd.NBD_INFO_EXPORT], [nbd.NBD_OPT_GO, nbd.NBD_REP_INFO, nbd.NBD_INFO_BLOCK_SIZE],
      [nbd.NBD_OPT_GO, nbd.NBD_REP_ACK, -1],
    ])
    expect(outcome).toMatchObject({ is: 'transmission', rest: Buffer.from('and more') })
    expect(events.map((event) => event.is)).toEqual(['info', 'go'])
  })

  test('EXPORT_NAME of old clients: 134 bytes with the zeroes, 10 without; unknown exports end the connection', () => {
    const ask = encodeOption(nbd.NBD_OPT_EXPORT_NAME, [Buffer.from('disk')])
    const fixed = nbd.NBD_FLAG_C_FIXED_NEWSTYLE
    for (const [flags, lengthBytes] of [[0, 134], [fixed, 134], [fixed | nbd.NBD_FLAG_C_NO_ZEROES, 10]] as const) {
      const step = new ServerHandshake(plain).push(Buffer.concat([u32(flags), ask]))
      expect(step.send.map((part) => part.length)).toEqual([lengthBytes])
      expect(step.send[0]?.readBigUInt64BE(0)).toBe(BigInt(disk.sizeBytes))
      expect(step.outcome?.is).toBe('transmission')
    }
    expect(() => talk(plain, encodeOption(nbd.NBD_OPT_EXPORT_NAME, [Buffer.from('nope')]))).toThrow(expect.objectContaining({ code: 'NBD_REFUSED' }))
  })

  test('ABORT is acknowledged and ends it; STARTTLS and unknown options are refused and do not', () => {
    const options = [encodeOption(nbd.NBD_OPT_STARTTLS), encodeOption(4711, [Buffer.alloc(100)]), encodeOption(nbd.NBD_OPT_ABORT)]
    const { replies, outcome, events } = talk(plain, ...options)
    expect(replies.map((reply) => reply.type)).toEqual([nbd.NBD_REP_ERR_UNSUP, nbd.NBD_REP_ERR_UNSUP, nbd.NBD_REP_ACK])
    expect(events).toEqual([{ is: 'starttls-refused' }, { is: 'unsupported', option: 4711 }])
    expect(outcome).toEqual({ is: 'aborted' })
  })

  test('metadata contexts need structured replies, match exactly when set and by prefix when listed, and belong to one export', () => {
    const set = (...queries: string[]): Buffer =>
      encodeOption(nbd.NBD_OPT_SET_META_CONTEXT, [encodeString('disk'), u32(queries.length), ...queries.map(encodeString)])
    const list = (...queries: string[]): Buffer =>
      encodeOption(nbd.NBD_OPT_LIST_META_CONTEXT, [encodeString('disk'), u32(queries.length), ...queries.map(encodeString)])
    const structured = encodeOption(nbd.NBD_OPT_STRUCTURED_REPLY)
    const names = (step: { replies: Reply[] }): string[] =>
      step.replies.filter((reply) => reply.type === nbd.NBD_REP_META_CONTEXT).map((reply) => reply.payload.toString('utf8', 4))
    expect(talk(plain, set(nbd.BASE_ALLOCATION)).replies.map((reply) => reply.type)).toEqual([nbd.NBD_REP_ERR_INVALID])
    expect(names(talk(plain, structured, list()))).toEqual(disk.metaContexts)
    expect(talk(plain, structured, list(), set('qemu:dirty-bitmap:a')).events).toEqual([
      { is: 'structured-replies' }, { is: 'meta-contexts-listed', exportName: 'disk' },
      { is: 'meta-contexts', exportName: 'disk', contexts: ['qemu:dirty-bitmap:a'] },
    ])
    expect(names(talk(plain, structured, list('qemu:')))).toEqual(disk.metaContexts.slice(1))
    expect(names(talk(plain, structured, list('qemu:dirty-bitmap:', 'base:')))).toEqual(disk.metaContexts)
    expect(names(talk(plain, structured, set('qemu:')))).toEqual([])
    const both: HandshakeOptions = { ...plain, findExport: () => disk }
    expect(talk(both, structured, set(nbd.BASE_ALLOCATION), goOf('disk')).outcome).toMatchObject({ session: { metaContexts: [nbd.BASE_ALLOCATION] } })
    expect(talk(both, structured, set(nbd.BASE_ALLOCATION), goOf('another')).outcome).toMatchObject({ session: { metaContexts: [] } })
    expect(talk(both, structured, set(nbd.BASE_ALLOCATION), set(), goOf('disk')).outcome).toMatchObject({ session: { metaContexts: [] } })
  })

  test('malformed payloads are refused, and negotiation goes on', () => {
    const bad = [
      encodeOption(nbd.NBD_OPT_GO), encodeOption(nbd.NBD_OPT_GO, [u32(5), Buffer.from('disk')]), encodeOption(nbd.NBD_OPT_GO, [encodeString('disk')]),
      encodeOption(nbd.NBD_OPT_GO, [encodeString('disk'), u16(2), u16(3)]), encodeOption(nbd.NBD_OPT_GO, [encodeString('disk'), u16(0), u16(0)]),
      encodeOption(nbd.NBD_OPT_INFO, [u32(4097), Buffer.alloc(4097), u16(0)]), encodeOption(nbd.NBD_OPT_LIST, [Buffer.alloc(1)]),
      encodeOption(nbd.NBD_OPT_STRUCTURED_REPLY, [Buffer.alloc(1)]),
    ]
    const { replies, outcome } = talk(plain, ...bad, goOf('disk'))
    expect(replies.slice(0, bad.length).map((reply) => reply.type)).toEqual(bad.map(() => nbd.NBD_REP_ERR_INVALID))
    expect(outcome?.is).toBe('transmission')
  })

  const tooLong = encodeOption(nbd.NBD_OPT_LIST)
  tooLong.writeUInt32BE(nbd.MAX_OPTION_BYTES + 1, 12)
  test.each([
    ['unknown client flags', Buffer.from([0, 0, 0, 8])],
    ['an option without its magic', Buffer.concat([FIXED, Buffer.alloc(16)])],
    ['an option above the cap', Buffer.concat([FIXED, tooLong])],
    ['LIST without fixed newstyle', Buffer.concat([u32(0), encodeOption(nbd.NBD_OPT_LIST)])],
    ['an export name above 4096 bytes', Buffer.concat([FIXED, encodeOption(nbd.NBD_OPT_EXPORT_NAME, [Buffer.alloc(4097)])])],
    ['more than 256 options', Buffer.concat([FIXED, ...Array.from({ length: 257 }, () => encodeOption(nbd.NBD_OPT_LIST))])],
  ])('%s ends the connection', (_name, bytes) => {
    expect(() => new ServerHandshake(plain).push(bytes)).toThrow(expect.objectContaining({ code: 'NBD_PROTOCOL' }))
  })
})

describe('ClientHandshake', () => {
  const greeting = new ServerHandshake(plain).greeting()
  const answer = (option: number, type: number, payload = Buffer.alloc(0)): Buffer => {
    const out = Buffer.alloc(20)
    out.writeUInt32BE(nbd.NBD_OPT_REPLY_MAGIC_HIGH, 0)
    out.writeUInt32BE(nbd.NBD_OPT_REPLY_MAGIC_LOW, 4)
    out.writeUInt32BE(option, 8)
    out.writeUInt32BE(type, 12)
    out.writeUInt32BE(payload.length, 16)
    return Buffer.concat([out, payload])
  }

  test('falls back to EXPORT_NAME where GO is unknown, and skips options with a server that is not fixed newstyle', () => {
    const client = new ClientHandshake({ exportName: 'x' })
    client.push(greeting)
    client.push(answer(nbd.NBD_OPT_STRUCTURED_REPLY, nbd.NBD_REP_ERR_UNSUP))
    const step = client.push(answer(nbd.NBD_OPT_GO, nbd.NBD_REP_ERR_UNSUP))
    expect(step.send).toEqual([encodeOption(nbd.NBD_OPT_EXPORT_NAME, [Buffer.from('x')])])
    const last = client.push(Buffer.concat([Buffer.from([0, 0, 0, 0, 0, 1, 0, 0, 0, 3]), Buffer.from('rest')]))
    expect(last.outcome).toMatchObject({ session: { sizeBytes: 65_536, transmissionFlags: 3, structuredReplies: false }, rest: Buffer.from('rest') })
    const old = Buffer.from(greeting)
    old.writeUInt16BE(0, 16)
    expect(new ClientHandshake({ exportName: 'x' }).push(old).send).toEqual([u32(0), encodeOption(nbd.NBD_OPT_EXPORT_NAME, [Buffer.from('x')])])
  })

  const oldstyle = Buffer.from(greeting)
  oldstyle.writeUInt32BE(0x00420281, 8)
  const structured = answer(nbd.NBD_OPT_STRUCTURED_REPLY, nbd.NBD_REP_ACK)
  const longReply = answer(nbd.NBD_OPT_STRUCTURED_REPLY, nbd.NBD_REP_ACK)
  longReply.writeUInt32BE(nbd.MAX_OPTION_BYTES + 1, 16)
  const blockSizes = Buffer.alloc(14)
  blockSizes.writeUInt16BE(nbd.NBD_INFO_BLOCK_SIZE, 0)
  test.each([
    ['what is not NBD', 'NBD_PROTOCOL', Buffer.from('SSH-2.0-OpenSSH_9.2p1')],
    ['an oldstyle server', 'NBD_REFUSED', oldstyle],
    ['an answer to another option', 'NBD_PROTOCOL', Buffer.concat([greeting, answer(nbd.NBD_OPT_GO, nbd.NBD_REP_ACK)])],
    ['a reply above the cap', 'NBD_PROTOCOL', Buffer.concat([greeting, longReply])],
    ['a reply without its magic', 'NBD_PROTOCOL', Buffer.concat([greeting, Buffer.alloc(20)])],
    ['GO without export information', 'NBD_PROTOCOL', Buffer.concat([greeting, structured, answer(nbd.NBD_OPT_GO, nbd.NBD_REP_ACK)])],
    ['impossible block sizes', 'NBD_PROTOCOL', Buffer.concat([greeting, structured, answer(nbd.NBD_OPT_GO, nbd.NBD_REP_INFO, blockSizes)])],
    ['a server that wants TLS', 'NBD_REFUSED', Buffer.concat([greeting, structured, answer(nbd.NBD_OPT_GO, nbd.NBD_REP_ERR_TLS_REQD)])],
  ])('refuses %s', (_name, code, bytes) => {
    expect(() => new ClientHandshake({ exportName: 'x' }).push(bytes)).toThrow(expect.objectContaining({ code }))
  })
})
