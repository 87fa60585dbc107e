// Both sides of a pairing over real TLS on loopback.
import { once } from 'node:events'
import { mkdtemp, readdir, readFile, rm, stat } from 'node:fs/promises'
import { createServer, connect } from 'node:net'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import type { TLSSocket } from 'node:tls'
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { createPairingDesk } from '../../agent/pairing/index.ts'
import type { PairingDesk } from '../../agent/pairing/index.ts'
import { connectSecure, listenSecure, pairProtocol, streamProtocol } from '../../core/link/index.ts'
import type { PeerIdentity, SecureListener } from '../../core/link/index.ts'
import { loggerTo } from '../../core/log/index.ts'
import type { LogLine } from '../../core/log/index.ts'
import { parseToken } from '../../core/pairing/index.ts'
import { createAuthority, loadOrCreateAuthority, loadOrCreateServerIdentity, loadOrCreateSiteId } from '../../core/pki/index.ts'
import { joinSite, loadPairing, removePairing } from '../../plugin/pairing/index.ts'
import type { Pairing } from '../../plugin/pairing/index.ts'

let root: string
let stack: AsyncDisposableStack
beforeEach(async () => {
  root = await mkdtemp('/tmp/cdp-pair-')
  stack = new AsyncDisposableStack()
  stack.defer(() => rm(root, { recursive: true, force: true }))
})
afterEach(() => stack.disposeAsync())

type Recovery = {
  desk: PairingDesk
  listener: SecureListener
  lines: LogLine[]
  streams: AsyncIterator<[TLSSocket, PeerIdentity]>
  refused: Promise<LogLine>
  clock: { aheadMs: number }
}
const recoverySite = async (name = 'recovery'): Promise<Recovery> => {
  const directory = join(root, name)
  const lines: LogLine[] = []
  const refused = Promise.withResolvers<LogLine>()
  const log = loggerTo('debug', (line) => {
    lines.push(line)
    if (line.message === 'connection refused') refused.resolve(line)
  })
  const clock = { aheadMs: 0 }
  const authority = await loadOrCreateAuthority(directory, { name })
  const desk = await createPairingDesk({
    authority,
    agentSiteId: await loadOrCreateSiteId(directory),
    directory,
    log,
    nowUnixMs: () => Date.now() + clock.aheadMs,
  })
  stack.use(desk)
  const waiting: [TLSSocket, PeerIdentity][] = []
  let wake = Promise.withResolvers<void>()
  const listener = await listenSecure({
    host: '127.0.0.1',
    port: 0,
    tls: await loadOrCreateServerIdentity(directory, authority, { commonName: name }),
    log,
    admit: (peer) => desk.sites.admit(peer),
    onPair: (socket) => desk.handle(socket),
    onStream: (socket, peer) => {
      waiting.push([socket, peer])
      wake.resolve()
    },
  })
  stack.use(listener)
  const streams = (async function* (): AsyncGenerator<[TLSSocket, PeerIdentity], undefined> {
    while (true) {
      const next = waiting.shift()
      if (next !== undefined) yield next
      else {
        await wake.promise
        wake = Promise.withResolvers<void>()
      }
    }
  })()
  return { desk, listener, lines, streams, refused: refused.promise, clock }
}
const tokenOf = async ({ desk, listener }: Recovery, validForMs?: number): Promise<string> =>
  (await desk.createToken({ host: '127.0.0.1', port: listener.port, ...(validForMs === undefined ? {} : { validForMs }) })).token
const join1 = async (token: string, name = 'protected'): Promise<Pairing> =>
  joinSite({ token, siteId: await loadOrCreateSiteId(join(root, name)), directory: join(root, name), deadlineMs: 5000 })
const stream = async (recovery: Recovery, pairing: Pairing): Promise<TLSSocket> => {
  const socket = await connectSecure({ host: pairing.host, port: pairing.port, tls: pairing.tls, alpn: streamProtocol })
  socket.on('error', () => undefined)
  stack.defer(() => void socket.destroy())
  expect(recovery.listener.port).toBe(pairing.port)
  return socket
}

describe('pairing', () => {
  test('a token pairs a site: its certificate opens a stream under its site id', async () => {
    const recovery = await recoverySite()
    const pairing = await join1(await tokenOf(recovery))
    expect(await loadPairing(join(root, 'protected'))).toEqual(pairing)
    expect((await stat(join(root, 'protected', 'pairing.json'))).mode & 0o777).toBe(0o600)
    await stream(recovery, pairing)
    const { value } = (await recovery.streams.next()) as { value: [TLSSocket, PeerIdentity] }
    expect(value[1].siteId).toBe(pairing.siteId)
    expect(recovery.desk.sites.list()).toMatchObject([{ siteId: pairing.siteId, pairedFromAddress: '127.0.0.1' }])
  })

  test('no secret is in any file or log line of the recovery site', async () => {
    const recovery = await recoverySite()
    const token = await tokenOf(recovery)
    const { secret } = parseToken(token)
    const before = await readFile(join(root, 'recovery', 'pairing-tokens.json'), 'utf8')
    expect(before).not.toContain(secret)
    await join1(token)
    for (const name of await readdir(join(root, 'recovery'), { recursive: true, withFileTypes: true })) {
      if (name.isFile()) expect(await readFile(join(name.parentPath, name.name), 'utf8')).not.toContain(secret)
    }
    expect(JSON.stringify(recovery.lines)).not.toContain(secret)
  })

  test('a token is good for one pairing, also across a restart of the agent, also for two at the same moment', async () => {
    const recovery = await recoverySite()
    const token = await tokenOf(recovery)
    const outcomes = await Promise.allSettled([join1(token, 'one'), join1(token, 'two'), join1(token, 'three')])
    expect(outcomes.map((outcome) => outcome.status).sort()).toEqual(['fulfilled', 'rejected', 'rejected'])
    await recovery.listener[Symbol.asyncDispose]()
    const again = await recoverySite()
    const moved = { ...parseToken(token), port: again.listener.port }
    await expect(join1(`cdp1.${Buffer.from(JSON.stringify(moved)).toString('base64url')}`, 'four')).rejects.toMatchObject({
      code: 'PAIRING',
      message: expect.stringContaining('used already'),
    })
    expect(again.desk.sites.list()).toHaveLength(1)
  })

  test('an expired token is refused and says so', async () => {
    const recovery = await recoverySite()
    const token = await tokenOf(recovery)
    recovery.clock.aheadMs = 15 * 60_000 + 1
    await expect(join1(token)).rejects.toMatchObject({
      code: 'PAIRING',
      message: expect.stringContaining('expired'),
      hint: expect.stringContaining('pvecdp pair token'),
    })
    expect(await loadPairing(join(root, 'protected'))).toBeUndefined()
  })

  test('a wrong secret is refused; the tenth makes the open tokens void', async () => {
    const recovery = await recoverySite()
    const token = await tokenOf(recovery)
    for (let tries = 0; tries < 10; tries += 1) {
      const guess = { ...parseToken(token), secret: Buffer.alloc(32, tries).toString('base64url') }
      await expect(join1(`cdp1.${Buffer.from(JSON.stringify(guess)).toString('base64url')}`)).rejects.toMatchObject({
        code: 'PAIRING',
        message: expect.stringContaining('does not know'),
      })
    }
    await expect(join1(token)).rejects.toMatchObject({ code: 'PAIRING', message: expect.stringContaining('void') })
    expect(recovery.lines.filter((line) => line.message === 'pairing refused')).toHaveLength(11)
    await join1(await tokenOf(recovery))
  })

  test('a man in the middle with another authority learns nothing: the token is still good afterwards', async () => {
    const recovery = await recoverySite()
    const attacker = await recoverySite('attacker')
    const token = await tokenOf(recovery)
    const diverted = `cdp1.${Buffer.from(JSON.stringify({ ...parseToken(token), port: attacker.listener.port })).toString('base64url')}`
    await expect(join1(diverted)).rejects.toMatchObject({ code: 'UNAUTHORIZED', hint: expect.stringContaining('nothing was sent') })
    expect(attacker.lines.filter((line) => line.message.startsWith('pairing'))).toEqual([])
    await join1(token)
  })

  test('a man in the middle who shows the genuine authority behind a certificate of his own is refused', async () => {
    const recovery = await recoverySite()
    const token = await tokenOf(recovery)
    const own = await createAuthority({ name: 'recovery' })
    const leaf = await loadOrCreateServerIdentity(join(root, 'mitm'), own, { commonName: 'recovery' })
    const genuine = (await loadOrCreateAuthority(join(root, 'recovery'), { name: 'recovery' })).certificatePem
    let heard = 0
    const mitm = await listenSecure({
      host: '127.0.0.1',
      port: 0,
      tls: { ...leaf, authorityPem: genuine },
      log: loggerTo('error', () => undefined),
      onStream: () => undefined,
      onPair: (socket) => void socket.on('data', () => (heard += 1)).on('error', () => undefined),
    })
    stack.use(mitm)
    await expect(join1(`cdp1.${Buffer.from(JSON.stringify({ ...parseToken(token), port: mitm.port })).toString('base64url')}`)).rejects.toMatchObject({
      code: 'UNAUTHORIZED',
    })
    expect(heard).toBe(0)
  })

  test('a relay that only passes bytes on changes nothing, one that cuts them leaves no half pairing', async () => {
    const recovery = await recoverySite()
    const token = await tokenOf(recovery)
    let allowedBytes = Number.POSITIVE_INFINITY
    const relay = createServer((near) => {
      const far = connect(recovery.listener.port, '127.0.0.1')
      let passed = 0
      far.on('data', (chunk) => {
        passed += chunk.length
        if (passed > allowedBytes) far.destroy()
        else near.write(chunk)
      })
      near.on('data', (chunk) => far.write(chunk))
      for (const [one, other] of [
        [near, far],
        [far, near],
      ] as const)
        one.on('error', () => undefined).on('close', () => other.destroy())
    }).listen(0, '127.0.0.1')
    await once(relay, 'listening')
    stack.defer(() => void relay.close())
    const through = (text: string): string =>
      `cdp1.${Buffer.from(JSON.stringify({ ...parseToken(text), port: (relay.address() as AddressInfo).port })).toString('base64url')}`
    await join1(through(token))
    const before = await loadPairing(join(root, 'protected'))
    allowedBytes = 2500
    await expect(join1(through(await tokenOf(recovery)))).rejects.toMatchObject({ code: expect.stringMatching(/PAIRING|CLOSED|UNREACHABLE/) })
    expect(await loadPairing(join(root, 'protected'))).toEqual(before)
  })

  test('pairing again replaces: the old certificate is refused from then on, the new one works', async () => {
    const recovery = await recoverySite()
    const first = await join1(await tokenOf(recovery))
    const second = await join1(await tokenOf(recovery))
    expect(second.siteId).toBe(first.siteId)
    await stream(recovery, first)
    expect((await recovery.refused).fields).toMatchObject({ reason: 'not-admitted', detail: expect.stringContaining('newer pairing') })
    await stream(recovery, second)
    expect(((await recovery.streams.next()).value as [TLSSocket, PeerIdentity])[1].siteId).toBe(first.siteId)
    expect(recovery.desk.sites.list()).toHaveLength(1)
    await recovery.desk.sites.remove(first.siteId)
    expect(recovery.desk.sites.admit({ siteId: first.siteId, fingerprintSha256: 'x' })).toContain('not paired')
    await removePairing(join(root, 'protected'))
    expect(await loadPairing(join(root, 'protected'))).toBeUndefined()
  })

  test('a cut-off token and nobody listening change nothing', async () => {
    const recovery = await recoverySite()
    const token = await tokenOf(recovery)
    await expect(join1(token.slice(0, -10))).rejects.toMatchObject({ code: 'BAD_INPUT' })
    await recovery.listener[Symbol.asyncDispose]()
    await expect(join1(token)).rejects.toMatchObject({ code: 'UNREACHABLE' })
    expect(await readdir(join(root, 'protected'))).toEqual(['site-id'])
  })

  test('rubbish and silence on the pairing port end, and the desk goes on', async () => {
    const recovery = await recoverySite()
    const authorityPem = (await loadOrCreateAuthority(join(root, 'recovery'), { name: 'recovery' })).certificatePem
    for (const bytes of [Buffer.from('GET / HTTP/1.1\r\n\r\n'), Buffer.alloc(100_000, 0xff), Buffer.from('\0\0\0\x02{}')]) {
      const socket = await connectSecure({ host: '127.0.0.1', port: recovery.listener.port, tls: { authorityPem }, alpn: pairProtocol })
      const closed = new Promise<void>((resolve) => socket.on('error', () => undefined).on('close', () => resolve()))
      socket.resume().write(bytes)
      await closed
    }
    await join1(await tokenOf(recovery))
  })
})
