import { once } from 'node:events'
import { connect as connectTcp } from 'node:net'
import type { Socket } from 'node:net'
import { connect as connectTls } from 'node:tls'
import type { TLSSocket } from 'node:tls'
import { afterEach, beforeAll, describe, expect, test } from '@jest/globals'
import { loggerTo } from '../log/index.ts'
import type { LogLine } from '../log/index.ts'
import { createAuthority, createKeyPair, fingerprintSha256, issueCertificate } from '../pki/index.ts'
import type { Authority, ClientTls, TlsIdentity } from '../pki/index.ts'
import { connectSecure, listenSecure, pairProtocol, readServerChain, streamProtocol } from './index.ts'
import type { ListenOptions, PeerIdentity, SecureListener } from './index.ts'
import { RefusalLog } from './refusal-log.ts'

const dayMs = 86_400_000
let ours: Authority
let theirs: Authority
let server: TlsIdentity
let client: ClientTls

const identity = async (
  authority: Authority,
  usage: 'server' | 'client',
  options: { nowUnixMs?: () => number; commonName?: string } = {},
): Promise<TlsIdentity> => {
  const keyPair = await createKeyPair()
  const certificatePem = await issueCertificate(authority, {
    commonName: options.commonName ?? 'site-a',
    publicKeyPem: keyPair.publicKeyPem,
    usage,
    validForMs: dayMs,
    ...(options.nowUnixMs === undefined ? {} : { nowUnixMs: options.nowUnixMs }),
  })
  return { certificatePem, privateKeyPem: keyPair.privateKeyPem, authorityPem: authority.certificatePem }
}

beforeAll(async () => {
  ours = await createAuthority({ name: 'ours' })
  theirs = await createAuthority({ name: 'ours' })
  server = await identity(ours, 'server', { commonName: 'recovery' })
  client = await identity(ours, 'client')
})

type Bench = {
  listener: SecureListener
  lines: LogLine[]
  nextStream: Promise<[TLSSocket, PeerIdentity]>
  nextPair: Promise<TLSSocket>
  nextRefusal: Promise<LogLine>
}
const open: (() => Promise<void>)[] = []
afterEach(async () => {
  for (const close of open.splice(0).reverse()) await close()
})

const bench = async (options: Partial<ListenOptions> = {}): Promise<Bench> => {
  const lines: LogLine[] = []
  const stream = Promise.withResolvers<[TLSSocket, PeerIdentity]>()
  const pair = Promise.withResolvers<TLSSocket>()
  const refusal = Promise.withResolvers<LogLine>()
  const log = loggerTo('debug', (line) => {
    lines.push(line)
    if (line.message === 'connection refused') refusal.resolve(line)
  })
  const listener = await listenSecure({
    host: '127.0.0.1',
    port: 0,
    tls: server,
    log,
    onStream: (socket, peer) => stream.resolve([socket, peer]),
    onPair: (socket) => pair.resolve(socket),
    ...options,
  })
  open.push(() => listener[Symbol.asyncDispose]())
  return { listener, lines, nextStream: stream.promise, nextPair: pair.promise, nextRefusal: refusal.promise }
}
const dial = async (listener: SecureListener, tls: ClientTls, alpn: typeof streamProtocol | typeof pairProtocol = streamProtocol): Promise<TLSSocket> => {
  const socket = await connectSecure({ host: '127.0.0.1', port: listener.port, tls, alpn })
  socket.on('error', () => undefined)
  open.push(async () => void socket.destroy())
  return socket
}
const ended = async (socket: Socket): Promise<void> => {
  const { promise, resolve } = Promise.withResolvers<void>()
  socket.once('close', () => resolve()).resume()
  if (!socket.closed) await promise
}

describe('listenSecure and connectSecure', () => {
  test('a stream is handed over with the identity of its certificate, bytes go both ways', async () => {
    const { listener, nextStream } = await bench()
    const socket = await dial(listener, client)
    const [accepted, peer] = await nextStream
    expect(peer).toMatchObject({ siteId: 'site-a', address: '127.0.0.1', fingerprintSha256: fingerprintSha256(client.certificatePem ?? '') })
    expect(socket.getProtocol()).toBe('TLSv1.3')
    accepted.write('from server')
    expect(String((await once(socket, 'data'))[0])).toBe('from server')
    socket.write('from client')
    expect(String((await once(accepted, 'data'))[0])).toBe('from client')
    expect(listener.counters()).toEqual({ accepted: 1, halfOpen: 0, open: 1, refused: {} })
  })

  test('pairing needs no client certificate', async () => {
    const { listener, nextPair } = await bench()
    await dial(listener, { authorityPem: ours.certificatePem }, pairProtocol)
    expect((await nextPair).alpnProtocol).toBe(pairProtocol)
  })

  const strangers: [string, string, () => Promise<ClientTls>][] = [
    ['without a certificate', 'no-certificate', async () => ({ authorityPem: ours.certificatePem })],
    [
      'with a certificate of another authority of the same name',
      'wrong-authority',
      async () => ({ ...(await identity(theirs, 'client')), authorityPem: ours.certificatePem }),
    ],
    ['with an expired certificate', 'expired', () => identity(ours, 'client', { nowUnixMs: () => Date.now() - 3 * dayMs })],
    ['with a certificate of the future', 'not-yet-valid', () => identity(ours, 'client', { nowUnixMs: () => Date.now() + 3 * dayMs })],
    ['with a server certificate', 'wrong-usage', () => identity(ours, 'server')],
  ]
  test.each(strangers)('a stream %s is refused, logged with reason and address, and counted', async (_name, reason, tls) => {
    const { listener, nextRefusal } = await bench()
    const socket = await dial(listener, await tls())
    const line = await nextRefusal
    expect(line).toMatchObject({ level: 'warn', fields: { reason, address: '127.0.0.1' } })
    await ended(socket)
    expect(listener.counters()).toMatchObject({ accepted: 0, open: 0, refused: { [reason]: 1 } })
  })

  test('a genuine peer that admit does not want is refused with its reason', async () => {
    const { listener, nextRefusal } = await bench({ admit: (peer) => (peer.siteId === 'site-a' ? 'replaced by a newer pairing' : undefined) })
    await ended(await dial(listener, client))
    expect((await nextRefusal).fields).toMatchObject({ reason: 'not-admitted', detail: 'replaced by a newer pairing' })
  })

  test('the client refuses a server of another authority, an expired one and one with a client certificate, before it says anything', async () => {
    for (const tls of [
      await identity(theirs, 'server'),
      await identity(ours, 'server', { nowUnixMs: () => Date.now() - 3 * dayMs }),
      await identity(ours, 'client'),
    ]) {
      const { listener } = await bench({ tls })
      await expect(dial(listener, client)).rejects.toMatchObject({ code: 'UNAUTHORIZED' })
      expect(listener.counters().open).toBe(0)
    }
  })

  test('TLS 1.2, a foreign ALPN, none at all, and plain text are refused and counted', async () => {
    const { listener } = await bench()
    const base = { host: '127.0.0.1', port: listener.port, ca: ours.certificatePem, checkServerIdentity: () => undefined }
    for (const options of [{ ...base, maxVersion: 'TLSv1.2' as const, ALPNProtocols: [streamProtocol] }, { ...base, ALPNProtocols: ['http/1.1'] }, base]) {
      const socket = connectTls(options)
      socket.on('error', () => undefined)
      await ended(socket)
    }
    const plain = connectTcp(listener.port, '127.0.0.1')
    plain.on('error', () => undefined).end('GET / HTTP/1.0\r\n\r\n')
    await ended(plain)
    const { refused, accepted } = listener.counters()
    expect(accepted).toBe(0)
    expect((refused['handshake-failed'] ?? 0) + (refused['unknown-protocol'] ?? 0)).toBe(4)
  })

  test('a resumed session is refused: it would skip the verification', async () => {
    const { listener, nextStream, nextRefusal } = await bench()
    const first = await dial(listener, client)
    const session = once(first, 'session')
    ;(await nextStream)[0].write('x')
    const [ticket] = (await session) as [Buffer]
    const again = connectTls({
      host: '127.0.0.1',
      port: listener.port,
      ca: ours.certificatePem,
      checkServerIdentity: () => undefined,
      ALPNProtocols: [streamProtocol],
      session: ticket,
    })
    again.on('error', () => undefined)
    await ended(again)
    expect((await nextRefusal).fields['reason']).toBe('session-resumed')
  })

  test('a silent client is cut off at the handshake deadline, and half-open connections are bounded', async () => {
    const { listener, nextStream } = await bench({ handshakeDeadlineMs: 1000, maxHalfOpen: 3 })
    const silent = Array.from({ length: 5 }, () => connectTcp(listener.port, '127.0.0.1'))
    await Promise.all(silent.map((socket) => ended(socket.on('error', () => undefined))))
    await dial(listener, client)
    await nextStream
    expect(listener.counters()).toEqual({ accepted: 1, halfOpen: 0, open: 1, refused: { 'too-many-half-open': 2, 'handshake-timeout': 3 } })
  })

  test('a replaced identity is what the next client sees', async () => {
    const { listener } = await bench()
    listener.replaceIdentity(await identity(theirs, 'server'))
    await expect(dial(listener, client)).rejects.toMatchObject({ code: 'UNAUTHORIZED' })
    await dial(listener, await identity(theirs, 'client'))
  })

  test('nobody there, a silent server, and a caller that gives up are three errors', async () => {
    const { listener } = await bench()
    const port = listener.port
    await listener[Symbol.asyncDispose]()
    const to = { host: '127.0.0.1', tls: client, alpn: streamProtocol } as const
    await expect(connectSecure({ ...to, port })).rejects.toMatchObject({ code: 'UNREACHABLE' })
    const { createServer } = await import('node:net')
    const mute = createServer((socket) => void open.push(async () => void socket.destroy())).listen(0, '127.0.0.1')
    await once(mute, 'listening')
    open.push(async () => void mute.close())
    const mutePort = (mute.address() as { port: number }).port
    await expect(connectSecure({ ...to, port: mutePort, deadlineMs: 100 })).rejects.toMatchObject({ code: 'TIMEOUT' })
    await expect(connectSecure({ ...to, port: mutePort, signal: AbortSignal.abort() })).rejects.toMatchObject({ code: 'ABORTED' })
    const abort = new AbortController()
    const given = connectSecure({ ...to, port: mutePort, signal: abort.signal })
    abort.abort()
    await expect(given).rejects.toMatchObject({ code: 'ABORTED' })
  })

  test('closing is idempotent, ends what is open, and a used port is an IO error', async () => {
    const { listener, nextStream } = await bench()
    await expect(bench({ port: listener.port })).rejects.toMatchObject({ code: 'IO' })
    const socket = await dial(listener, client)
    await nextStream
    await Promise.all([listener[Symbol.asyncDispose](), listener[Symbol.asyncDispose]()])
    await ended(socket)
  })

  test('the chain for pairing ends in the authority', async () => {
    const { listener } = await bench()
    const chain = await readServerChain({ host: '127.0.0.1', port: listener.port })
    expect(chain.map((certificate) => fingerprintSha256(certificate))).toEqual([
      fingerprintSha256(server.certificatePem),
      fingerprintSha256(ours.certificatePem),
    ])
  })
})

describe('RefusalLog', () => {
  test('a flood is counted fully and logged at most 20 times in 10 s', () => {
    const lines: LogLine[] = []
    let nowMs = 0
    const refusals = new RefusalLog<'expired'>(
      loggerTo('info', (line) => lines.push(line)),
      () => nowMs,
    )
    for (let index = 0; index < 1000; index += 1) refusals.refuse('expired', { address: '192.0.2.1', port: index })
    expect(lines).toHaveLength(20)
    nowMs = 10_001
    refusals.refuse('expired', { address: '192.0.2.1', port: 1 })
    expect(lines[20]?.fields).toMatchObject({ notLoggedBefore: 980 })
    expect(refusals.counts()).toEqual({ expired: 1001 })
  })
})
