import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { connect, createServer } from 'node:net'
import type { AddressInfo, Socket } from 'node:net'
import { duplexPair } from 'node:stream'
import type { Duplex } from 'node:stream'
import { connect as connectTls, createServer as createTlsServer } from 'node:tls'
import { afterEach, expect, test } from '@jest/globals'
import { createAuthority, createKeyPair, issueCertificate } from '../pki/index.ts'
import { readInto } from './index.ts'

const close: (() => Promise<unknown>)[] = []
afterEach(async () => {
  for (const one of close.splice(0).reverse()) await one()
})

type Pair = { sender: Duplex; receiver: Duplex }

const unixPair = async (): Promise<Pair> => {
  const directory = await mkdtemp('/tmp/cdp-')
  close.push(() => rm(directory, { recursive: true }))
  const server = createServer({ pauseOnConnect: true })
  server.listen(`${directory}/s`)
  await once(server, 'listening')
  const sender = connect(`${directory}/s`)
  const [receiver] = (await once(server, 'connection')) as [Socket]
  close.push(async () => {
    sender.destroy()
    receiver.destroy()
    await new Promise((resolve) => server.close(resolve))
  })
  return { sender, receiver }
}

/** The receiver wraps an accepted TCP connection, as the listener of the link does it. */
const tlsPair = async (): Promise<Pair> => {
  const authority = await createAuthority({ name: 'test' })
  const keys = await createKeyPair()
  const cert = await issueCertificate(authority, { commonName: 'x', publicKeyPem: keys.publicKeyPem, usage: 'server', validForMs: 86_400_000 })
  const secure = createTlsServer({ cert, key: keys.privateKeyPem, minVersion: 'TLSv1.3' })
  const server = createServer((socket) => void secure.emit('connection', socket))
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const sender = connectTls({ host: '127.0.0.1', port: (server.address() as AddressInfo).port, ca: authority.certificatePem, checkServerIdentity: () => undefined })
  const [receiver] = (await once(secure, 'secureConnection')) as [Duplex]
  close.push(async () => {
    sender.destroy()
    receiver.destroy()
    await new Promise((resolve) => server.close(resolve))
  })
  return { sender, receiver }
}

const streamPair = async (): Promise<Pair> => {
  const [sender, receiver] = duplexPair()
  return { sender, receiver }
}

test.each([
  ['an accepted socket', unixPair, true],
  ['a TLS socket', tlsPair, true],
  ['any other stream', streamPair, false],
] as const)('%s: every byte is read in order to where it was asked for, and pausing holds it back', async (_name, makePair, expectDirect) => {
  const { sender, receiver } = await makePair()
  const sent = randomBytes(3 * 1024 * 1024)
  const target = Buffer.alloc(sent.length)
  const spare = Buffer.alloc(1)
  let at = 0
  let given = 0
  const arrived = Promise.withResolvers<void>()
  const direct = readInto(receiver, {
    nextBuffer: () => {
      given = 1 + ((at * 7919) % 100_000)
      return at < target.length ? target.subarray(at, at + given) : spare
    },
    onRead: (lengthBytes) => {
      expect(lengthBytes).toBeLessThanOrEqual(given)
      at += lengthBytes
      if (at === target.length) arrived.resolve()
    },
  })
  expect(direct).toBe(expectDirect)
  sender.write(sent.subarray(0, 100_000))
  while (at < 100_000) await new Promise((resolve) => setImmediate(resolve))
  receiver.pause()
  sender.write(sent.subarray(100_000))
  for (let turn = 0; turn < 50; turn++) await new Promise((resolve) => setImmediate(resolve))
  expect(at).toBeLessThan(sent.length)
  receiver.resume()
  await arrived.promise
  expect(target.equals(sent)).toBe(true)
  const ended = once(receiver, 'end')
  sender.end()
  await ended
})

test.each([['an accepted socket', unixPair], ['a TLS socket', tlsPair]] as const)('%s: what a reader throws ends the connection with that error', async (_name, makePair) => {
  const { sender, receiver } = await makePair()
  sender.on('error', () => undefined)
  const failed = once(receiver, 'error')
  const buffer = Buffer.alloc(1024)
  readInto(receiver, { nextBuffer: () => buffer, onRead: () => { throw new Error('no such message') } })
  sender.write('x')
  expect(((await failed) as [Error])[0].message).toBe('no such message')
  expect(receiver.destroyed).toBe(true)
})
