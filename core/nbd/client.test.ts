import { mkdtemp, rm } from 'node:fs/promises'
import { createServer, type Server, type Socket } from 'node:net'
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { checkHandshake, NbdClient, type NbdClientOptions } from './client.ts'
import * as nbd from './constants.ts'
import { writeErrorChunk, writeNoneChunk, writeOffsetDataHeader, writeOffsetHole, writeSimpleReply } from './reply-encoder.ts'
import { RequestParser, type RequestSink } from './request-parser.ts'
import { ServerHandshake } from './server-handshake.ts'

type Request = { type: number; flags: number; cookieHigh: number; cookieLow: number; offsetBytes: number; lengthBytes: number }
type Answer = (request: Request, socket: Socket) => void

let root = ''
let path = ''
let server: Server | undefined
const sockets = new Set<Socket>()
const clients: NbdClient[] = []

beforeEach(async () => {
  root = await mkdtemp('/tmp/cdp-')
  path = `${root}/s`
})
afterEach(async () => {
  for (const client of clients.splice(0)) await client[Symbol.asyncDispose]()
  for (const socket of sockets) socket.destroy()
  sockets.clear()
  await new Promise((resolve) => (server ? server.close(resolve) : resolve(undefined)))
  server = undefined
  await rm(root, { recursive: true })
})

const listen = (onConnection: (socket: Socket) => void): Promise<void> => {
  server = createServer((socket) => {
    sockets.add(socket)
    socket.on('error', () => undefined)
    onConnection(socket)
  })
  return new Promise((resolve) => server?.listen({ path }, resolve))
}

/** A server whose handshake is ours and whose answers are the test's. */
const serveBy = (answer: Answer, structuredReplies = true): Promise<void> =>
  listen((socket) => {
    const found = {
      name: 'disk', sizeBytes: 1 << 20, transmissionFlags: nbd.NBD_FLAG_HAS_FLAGS | nbd.NBD_FLAG_SEND_FLUSH, metaContexts: [nbd.BASE_ALLOCATION],
      blockSize: { minBytes: 512, preferredBytes: 4096, maxBytes: 65_536 },
    }
    const handshake = new ServerHandshake({ findExport: () => found, listExports: () => [], structuredReplies })
    let request: Request | undefined
    const sink: RequestSink = {
      onRequest: (type, flags, cookieHigh, cookieLow, offsetBytes, lengthBytes) => {
        request = { type, flags, cookieHigh, cookieLow, offsetBytes, lengthBytes }
      },
      onPayload: () => undefined,
      onRequestEnd: () => {
        if (request) answer(request, socket)
      },
    }
    let parser: RequestParser | undefined
    socket.write(handshake.greeting())
    socket.on('data', (chunk) => {
      if (parser) return parser.push(chunk)
      const step = handshake.push(chunk)
      for (const bytes of step.send) socket.write(bytes)
      if (step.outcome) parser = new RequestParser(sink, { maxPayloadBytes: 65_536 })
    })
  })

const join = async (options: Partial<NbdClientOptions> = {}): Promise<NbdClient> => {
  const client = await NbdClient.connect({ path }, { exportName: 'disk', ...options })
  clients.push(client)
  return client
}
const coded = (code: string): unknown => expect.objectContaining({ code })

const made = (sizeBytes: number, write: (target: Buffer) => number): Buffer => {
  const target = Buffer.alloc(sizeBytes)
  write(target)
  return target
}
const data = (request: Request, offsetBytes: number, content: Buffer, done = true): Buffer =>
  Buffer.concat([made(28, (to) => writeOffsetDataHeader(to, 0, done, request.cookieHigh, request.cookieLow, offsetBytes, content.length)), content])
const hole = (request: Request, offsetBytes: number, lengthBytes: number, done: boolean): Buffer =>
  made(32, (to) => writeOffsetHole(to, 0, done, request.cookieHigh, request.cookieLow, offsetBytes, lengthBytes))

describe('NbdClient', () => {
  test('puts chunks of one read together in whatever order they come', async () => {
    await serveBy((request, socket) => {
      if (request.type !== nbd.NBD_CMD_READ) return
      socket.write(Buffer.concat([data(request, 1536, Buffer.alloc(512, 3), false), hole(request, 512, 1024, false), data(request, 0, Buffer.alloc(512, 1))]))
    })
    const client = await join()
    const target = Buffer.alloc(2050, 0xee)
    expect(await client.readInto(target, 1, 0, 2048)).toEqual([{ offsetBytes: 512, lengthBytes: 1024 }])
    expect(target.equals(Buffer.concat([Buffer.from([0xee]), Buffer.alloc(512, 1), Buffer.alloc(1024), Buffer.alloc(512, 3), Buffer.from([0xee])]))).toBe(true)
  })

  const breaks: [string, (request: Request) => Buffer][] = [
    ['data outside the range asked for', (request) => data(request, 512, Buffer.alloc(512))],
    ['less than asked for', (request) => data(request, 0, Buffer.alloc(256))],
    ['the same data twice', (request) => Buffer.concat([data(request, 0, Buffer.alloc(512), false), hole(request, 256, 256, true)])],
    ['an unknown cookie', (request) => data({ ...request, cookieHigh: request.cookieHigh + 1 }, 0, Buffer.alloc(512))],
    ['a slot that does not exist', (request) => data({ ...request, cookieLow: 99 }, 0, Buffer.alloc(512))],
    ['a simple reply to a structured read', (request) => made(16, (to) => writeSimpleReply(to, 0, 0, request.cookieHigh, request.cookieLow))],
    ['success without data', (request) => made(20, (to) => writeNoneChunk(to, 0, request.cookieHigh, request.cookieLow))],
    ['no reply at all but noise', () => Buffer.alloc(64, 0x55)],
  ]
  test.each(breaks)('a server that sends %s loses the connection, and everything under way is rejected', async (_name, reply) => {
    await serveBy((request, socket) => {
      if (request.offsetBytes === 0 && request.type === nbd.NBD_CMD_READ) socket.write(reply(request))
    })
    const client = await join()
    const other = client.read(4096, 512)
    await expect(client.read(0, 512)).rejects.toEqual(coded('NBD_PROTOCOL'))
    await expect(other).rejects.toEqual(coded('NBD_PROTOCOL'))
    await client.closed
    await expect(client.read(0, 512)).rejects.toEqual(coded('NBD_PROTOCOL'))
  })

  test('an error in the middle of a structured reply rejects that read with its message, and only that', async () => {
    await serveBy((request, socket) => {
      if (request.type !== nbd.NBD_CMD_READ) return
      const message = Buffer.from('bad sector')
      if (request.offsetBytes > 0) socket.write(data(request, request.offsetBytes, Buffer.alloc(512)))
      else {
        const error = made(26 + message.length, (to) => writeErrorChunk(to, 0, request.cookieHigh, request.cookieLow, nbd.NBD_EIO, message))
        socket.write(Buffer.concat([data(request, 0, Buffer.alloc(256), false), error]))
      }
    })
    const client = await join()
    await expect(client.read(0, 512)).rejects.toMatchObject({ code: 'NBD_REFUSED', message: expect.stringContaining('EIO: bad sector') })
    expect(await client.read(512, 512)).toHaveLength(512)
  })

  test('a dropped connection rejects what is under way and what waits for a slot with CLOSED', async () => {
    let requests = 0
    await serveBy((request, socket) => {
      if (request.type === nbd.NBD_CMD_READ && ++requests === 2) socket.destroy()
    })
    const client = await join({ maxRequestsInFlight: 2 })
    const reads = await Promise.allSettled(Array.from({ length: 5 }, (_, index) => client.read(index * 512, 512)))
    expect(reads.map((read) => (read.status === 'rejected' ? (read.reason as unknown) : read.value))).toEqual(Array.from({ length: 5 }, () => coded('CLOSED')))
    await client.closed
    await expect(client.flush()).rejects.toEqual(coded('CLOSED'))
  })

  test('an aborted read is rejected at once; its late data go nowhere and its slot is used again', async () => {
    const held: (() => void)[] = []
    await serveBy((request, socket) => {
      if (request.type !== nbd.NBD_CMD_READ) return
      held.push(() => socket.write(data(request, request.offsetBytes, Buffer.alloc(512, 7))))
      if (request.offsetBytes > 0) for (const send of held) send()
    })
    const client = await join({ maxRequestsInFlight: 2 })
    const target = Buffer.alloc(512)
    const giveUp = new AbortController()
    const first = client.readInto(target, 0, 0, 512, giveUp.signal)
    giveUp.abort()
    await expect(first).rejects.toEqual(coded('ABORTED'))
    expect((await client.read(512, 512)).equals(Buffer.alloc(512, 7))).toBe(true)
    expect(target.equals(Buffer.alloc(512))).toBe(true)
    await expect(client.read(0, 512, AbortSignal.abort())).rejects.toEqual(coded('ABORTED'))
  })

  test('giving up while waiting for a slot leaves the line', async () => {
    const arrived = Promise.withResolvers<() => void>()
    await serveBy((request, socket) => {
      const send = (): void => void socket.write(data(request, request.offsetBytes, Buffer.alloc(512)))
      if (request.type !== nbd.NBD_CMD_READ) return
      if (request.offsetBytes === 0) arrived.resolve(send)
      else send()
    })
    const client = await join({ maxRequestsInFlight: 1 })
    const first = client.read(0, 512)
    const giveUp = new AbortController()
    const second = client.read(512, 512, giveUp.signal)
    const third = client.read(1024, 512).then(() => 'read')
    giveUp.abort()
    await expect(second).rejects.toEqual(coded('ABORTED'))
    const release = await arrived.promise
    release()
    await first
    expect(await third).toBe('read')
  })

  test('ranges outside the export, not aligned or not offered are refused before anything is sent', async () => {
    const seen: number[] = []
    await serveBy((request) => void seen.push(request.type))
    const client = await join()
    for (const [offsetBytes, lengthBytes] of [[-512, 512], [0, 1 << 21], [1, 512], [0, 100], [Number.NaN, 512], [2 ** 53, 512]] as const) {
      await expect(client.read(offsetBytes, lengthBytes)).rejects.toEqual(coded('BAD_INPUT'))
    }
    await expect(client.readInto(Buffer.alloc(100), 0, 0, 512)).rejects.toEqual(coded('BAD_INPUT'))
    await expect(client.trim(0, 512)).rejects.toEqual(coded('NBD_REFUSED'))
    await expect(client.write(0, Buffer.alloc(512), { fua: true })).rejects.toEqual(coded('NBD_REFUSED'))
    await expect(client.blockStatus(0, 512)).rejects.toEqual(coded('BAD_INPUT'))
    expect(seen).toEqual([])
  })

  test('disposal says NBD_CMD_DISC, is idempotent and rejects what is under way with CLOSED', async () => {
    const seen = Promise.withResolvers<void>()
    await serveBy((request, socket) => {
      if (request.type !== nbd.NBD_CMD_DISC) return
      seen.resolve()
      socket.end()
    })
    const client = await join()
    const reading = expect(client.read(0, 512)).rejects.toEqual(coded('CLOSED'))
    await Promise.all([client[Symbol.asyncDispose](), client[Symbol.asyncDispose]()])
    await Promise.all([reading, seen.promise])
  })
})

describe('connecting', () => {
  test('nobody there, a silent server, a server that hangs up, giving up: each has its code', async () => {
    await expect(NbdClient.connect({ path }, { exportName: 'disk' })).rejects.toEqual(coded('UNREACHABLE'))
    await listen(() => undefined)
    await expect(checkHandshake({ path }, 'disk', 20)).rejects.toEqual(coded('TIMEOUT'))
    await expect(NbdClient.connect({ path }, { exportName: 'disk', signal: AbortSignal.timeout(20) })).rejects.toEqual(coded('ABORTED'))
    await expect(NbdClient.connect({ path }, { exportName: 'disk', signal: AbortSignal.abort() })).rejects.toEqual(coded('ABORTED'))
    server?.on('connection', (socket: Socket) => socket.end())
    await expect(NbdClient.connect({ path }, { exportName: 'disk' })).rejects.toEqual(coded('CLOSED'))
  })

  test('checkHandshake leaves nothing open', async () => {
    await serveBy((request, socket) => {
      if (request.type === nbd.NBD_CMD_DISC) socket.end()
    })
    await checkHandshake({ path }, 'disk', 1000)
    const left = await new Promise((resolve) => server?.getConnections((_error, count) => resolve(count)))
    expect(left).toBe(0)
  })

  test('checkHandshake is not satisfied with a server that ignores the goodbye', async () => {
    await serveBy(() => undefined)
    server?.on('connection', (socket: Socket) => Object.assign(socket, { allowHalfOpen: true }))
    await expect(checkHandshake({ path }, 'disk', 50)).rejects.toEqual(coded('TIMEOUT'))
  })
})
