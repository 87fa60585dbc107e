// Our certificates and our TLS port as OpenSSL's own tools see them.
import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals'
import { listenSecure, streamProtocol } from '../../core/link/index.ts'
import type { SecureListener } from '../../core/link/index.ts'
import { loggerTo } from '../../core/log/index.ts'
import type { LogLine } from '../../core/log/index.ts'
import { createAuthority, createCsr, createKeyPair, issueCertificate } from '../../core/pki/index.ts'

const openssl = async (...args: string[]): Promise<string> => {
  const { stdout } = await promisify(execFile)('openssl', args, { encoding: 'utf8' })
  return stdout
}
let root: string
const file = (name: string): string => join(root, name)

beforeAll(async () => {
  root = await mkdtemp('/tmp/cdp-cert-')
  const authority = await createAuthority({ name: 'recovery' })
  const stranger = await createAuthority({ name: 'recovery' })
  const clientKeys = await createKeyPair()
  const serverKeys = await createKeyPair()
  const csrPem = await createCsr({ commonName: 'site-a', keyPair: clientKeys })
  const client = { commonName: 'site-a', csrPem, usage: 'client', validForMs: 86_400_000 } as const
  const files: Record<string, string> = {
    'ca.pem': authority.certificatePem,
    'client.csr': csrPem,
    'client.key': clientKeys.privateKeyPem,
    'client.pem': await issueCertificate(authority, client),
    'stranger.pem': await issueCertificate(stranger, client),
    'expired.pem': await issueCertificate(authority, { ...client, nowUnixMs: () => Date.now() - 3 * 86_400_000 }),
    'server.key': serverKeys.privateKeyPem,
    'server.pem': await issueCertificate(authority, {
      commonName: 'recovery',
      publicKeyPem: serverKeys.publicKeyPem,
      usage: 'server',
      validForMs: 86_400_000,
      subjectAltNames: ['127.0.0.1'],
    }),
  }
  for (const [name, text] of Object.entries(files)) await writeFile(file(name), text, { mode: 0o600 })
})
afterAll(() => rm(root, { recursive: true, force: true }))

describe('openssl', () => {
  test('accepts the chain strictly, each certificate for its own purpose only', async () => {
    const verify = (purpose: string, name: string): Promise<string> =>
      openssl('verify', '-x509_strict', '-purpose', purpose, '-CAfile', file('ca.pem'), file(name))
    expect(await verify('sslserver', 'server.pem')).toContain('OK')
    expect(await verify('sslclient', 'client.pem')).toContain('OK')
    await expect(verify('sslclient', 'server.pem')).rejects.toMatchObject({ code: 2 })
    await expect(verify('sslserver', 'client.pem')).rejects.toMatchObject({ code: 2 })
    await expect(verify('sslclient', 'stranger.pem')).rejects.toMatchObject({ code: 2 })
    await expect(verify('sslclient', 'expired.pem')).rejects.toMatchObject({ code: 2 })
  })

  test('reads the request and the extensions as they are meant', async () => {
    expect(await openssl('req', '-in', file('client.csr'), '-noout', '-verify', '-subject')).toMatch(/CN ?= ?site-a/)
    const authority = await openssl('x509', '-in', file('ca.pem'), '-noout', '-text')
    expect(authority).toMatch(/Basic Constraints: critical\s+CA:TRUE, pathlen:0/)
    expect(authority).toMatch(/Key Usage: critical\s+Certificate Sign, CRL Sign/)
    const server = await openssl('x509', '-in', file('server.pem'), '-noout', '-text')
    expect(server).toMatch(/Extended Key Usage: critical\s+TLS Web Server Authentication\n/)
    expect(server).toContain('IP Address:127.0.0.1')
  })
})

describe('openssl s_client against our port', () => {
  const attempt = async (args: string[]): Promise<{ output: string; listener: SecureListener; lines: LogLine[] }> => {
    const lines: LogLine[] = []
    const { readFile } = await import('node:fs/promises')
    await using listener = await listenSecure({
      host: '127.0.0.1',
      port: 0,
      log: loggerTo('debug', (line) => lines.push(line)),
      tls: {
        certificatePem: await readFile(file('server.pem'), 'utf8'),
        privateKeyPem: await readFile(file('server.key'), 'utf8'),
        authorityPem: await readFile(file('ca.pem'), 'utf8'),
      },
      onStream: (socket, peer) => void socket.end(`welcome ${peer.siteId}\n`),
      onPair: (socket) => void socket.end('pairing\n'),
    })
    const child = spawn('openssl', ['s_client', '-connect', `127.0.0.1:${listener.port}`, '-CAfile', file('ca.pem'), '-verify_return_error', '-quiet', ...args])
    let output = ''
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (chunk) => (output += String(chunk)))
    await once(child, 'close')
    return { output, listener, lines }
  }
  const certificate = (name: string): string[] => ['-cert', file(name), '-key', file('client.key')]

  test('a good client certificate is welcomed over TLS 1.3; TLS 1.2 is not spoken', async () => {
    const { output } = await attempt(['-alpn', streamProtocol, ...certificate('client.pem')])
    expect(output).toContain('welcome site-a')
    const old = await attempt(['-tls1_2', '-alpn', streamProtocol, ...certificate('client.pem')])
    expect(old.output).not.toContain('welcome')
    expect(old.listener.counters().refused).toEqual({ 'handshake-failed': 1 })
  })

  test.each([
    ['no-certificate', []],
    ['wrong-authority', ['stranger.pem']],
    ['expired', ['expired.pem']],
  ])('%s is refused and logged', async (reason, names) => {
    const { output, listener, lines } = await attempt(['-alpn', streamProtocol, ...names.flatMap(certificate)])
    expect(output).not.toContain('welcome')
    expect(listener.counters()).toMatchObject({ accepted: 0, refused: { [reason]: 1 } })
    expect(lines).toContainEqual(expect.objectContaining({ level: 'warn', fields: expect.objectContaining({ reason, address: '127.0.0.1' }) }))
  })
})
