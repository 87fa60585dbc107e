import { X509Certificate } from 'node:crypto'
import { chmod, mkdtemp, readdir, rm, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals'
import {
  createAuthority,
  createCsr,
  createKeyPair,
  fingerprintSha256,
  issueCertificate,
  judgeCertificate,
  loadOrCreateAuthority,
  loadOrCreateServerIdentity,
  loadOrCreateSiteId,
  readPrivateFile,
  verifyCsr,
} from './index.ts'
import type { Authority } from './index.ts'

const dayMs = 86_400_000
let root: string
let authority: Authority

beforeAll(async () => {
  root = await mkdtemp('/tmp/cdp-pki-')
  authority = await createAuthority({ name: 'pve-cdp-test' })
})
afterAll(() => rm(root, { recursive: true, force: true }))

const issue = async (
  usage: 'server' | 'client',
  options: { from?: Authority; nowUnixMs?: () => number; validForMs?: number } = {},
): Promise<X509Certificate> => {
  const { publicKeyPem } = await createKeyPair()
  return new X509Certificate(
    await issueCertificate(options.from ?? authority, {
      commonName: 'site-a',
      publicKeyPem,
      usage,
      validForMs: options.validForMs ?? dayMs,
      ...(options.nowUnixMs === undefined ? {} : { nowUnixMs: options.nowUnixMs }),
    }),
  )
}

describe('authority and certificates', () => {
  test('an authority is P-256, self-signed, may sign certificates and nothing below them, for ten years', () => {
    const certificate = new X509Certificate(authority.certificatePem)
    expect(certificate.ca).toBe(true)
    expect(certificate.verify(certificate.publicKey)).toBe(true)
    expect(certificate.publicKey.asymmetricKeyDetails?.namedCurve).toBe('prime256v1')
    expect((certificate.validToDate.getTime() - Date.now()) / dayMs).toBeCloseTo(3652, 0)
    expect(certificate.serialNumber).toHaveLength(32)
    expect(fingerprintSha256(authority.certificatePem)).toMatch(/^[0-9a-f]{64}$/)
  })

  test('an issued certificate is good for its usage only, and tells who it is', async () => {
    const client = await issue('client')
    expect(judgeCertificate(client, { authorityPem: authority.certificatePem, usage: 'client' })).toMatchObject({ ok: true, commonName: 'site-a' })
    expect(judgeCertificate(client, { authorityPem: authority.certificatePem, usage: 'server' })).toEqual({ ok: false, reason: 'wrong-usage' })
    expect(judgeCertificate(undefined, { authorityPem: authority.certificatePem, usage: 'client' })).toEqual({ ok: false, reason: 'no-certificate' })
  })

  test('another authority of the same name, an expired and a future certificate are told apart', async () => {
    const stranger = await createAuthority({ name: 'pve-cdp-test' })
    const judge = (certificate: X509Certificate, nowUnixMs = Date.now()) =>
      judgeCertificate(certificate, { authorityPem: authority.certificatePem, usage: 'client', nowUnixMs: () => nowUnixMs })
    expect(judge(await issue('client', { from: stranger }))).toEqual({ ok: false, reason: 'wrong-authority' })
    const good = await issue('client')
    expect(judge(good, Date.now() + 2 * dayMs)).toEqual({ ok: false, reason: 'expired' })
    expect(judge(good, Date.now() - 2 * dayMs)).toEqual({ ok: false, reason: 'not-yet-valid' })
    expect(judge(new X509Certificate(authority.certificatePem))).toEqual({ ok: false, reason: 'wrong-usage' })
  })

  test('no certificate outlives its authority', async () => {
    const certificate = await issue('server', { validForMs: 100 * 365 * dayMs })
    expect(certificate.validToDate).toEqual(new X509Certificate(authority.certificatePem).validToDate)
  })

  test('a request is verified: name, key, signature', async () => {
    const keyPair = await createKeyPair()
    const csrPem = await createCsr({ commonName: 'site-b', keyPair })
    expect(await verifyCsr(csrPem)).toEqual({ commonName: 'site-b', publicKeyPem: keyPair.publicKeyPem })
    const certificatePem = await issueCertificate(authority, {
      commonName: 'site-b',
      csrPem,
      usage: 'client',
      validForMs: dayMs,
      subjectAltNames: ['192.0.2.1', '2001:db8::1', 'node.example'],
    })
    expect(new X509Certificate(certificatePem).subjectAltName).toBe('IP Address:192.0.2.1, IP Address:2001:DB8:0:0:0:0:0:1, DNS:node.example')
    await expect(issueCertificate(authority, { commonName: 'site-c', csrPem, usage: 'client', validForMs: dayMs })).rejects.toMatchObject({ code: 'BAD_INPUT' })
  })

  test('a request that is altered, cut or not one at all is refused', async () => {
    const csrPem = await createCsr({ commonName: 'site-b', keyPair: await createKeyPair() })
    const der = Buffer.from(csrPem.replaceAll(/-----[^-]+-----|\s/g, ''), 'base64')
    der[der.indexOf('site-b')] = 'S'.charCodeAt(0)
    const altered = `-----BEGIN CERTIFICATE REQUEST-----\n${der.toString('base64')}\n-----END CERTIFICATE REQUEST-----\n`
    for (const bad of [altered, csrPem.slice(0, 200), 'hello', '', 'x'.repeat(10_000)])
      await expect(verifyCsr(bad)).rejects.toMatchObject({ code: 'BAD_INPUT' })
  })

  test.each(['', 'a b', 'x/CN=admin', 'a,CN=b', 'é', 'x'.repeat(65)])('the name "%s" is refused', async (commonName) => {
    const { publicKeyPem } = await createKeyPair()
    await expect(issueCertificate(authority, { commonName, publicKeyPem, usage: 'client', validForMs: dayMs })).rejects.toMatchObject({ code: 'BAD_INPUT' })
  })
})

describe('store', () => {
  test('authority, server identity and site id are made once, 0600 in a directory 0700', async () => {
    const directory = join(root, 'a', 'pki')
    const first = await loadOrCreateAuthority(directory, { name: 'recovery' })
    expect(await loadOrCreateAuthority(directory, { name: 'recovery' })).toEqual(first)
    const server = await loadOrCreateServerIdentity(directory, first, { commonName: 'recovery' })
    expect(await loadOrCreateServerIdentity(directory, first, { commonName: 'recovery' })).toEqual(server)
    expect(await loadOrCreateSiteId(directory)).toBe(await loadOrCreateSiteId(directory))
    expect((await stat(directory)).mode & 0o777).toBe(0o700)
    expect((await readdir(directory)).sort()).toEqual(['authority.pem', 'server.pem', 'site-id'])
    for (const name of await readdir(directory)) expect((await stat(join(directory, name))).mode & 0o777).toBe(0o600)
  })

  test('a server certificate near its end, of another name or of another authority is issued anew', async () => {
    const directory = join(root, 'b')
    const own = await loadOrCreateAuthority(directory, { name: 'recovery' })
    const first = await loadOrCreateServerIdentity(directory, own, { commonName: 'one' })
    const later = await loadOrCreateServerIdentity(directory, own, { commonName: 'one', nowUnixMs: () => Date.now() + 600 * dayMs })
    expect(later.certificatePem).not.toBe(first.certificatePem)
    const renamed = await loadOrCreateServerIdentity(directory, own, { commonName: 'two' })
    expect(judgeCertificate(new X509Certificate(renamed.certificatePem), { authorityPem: own.certificatePem, usage: 'server' })).toMatchObject({
      ok: true,
      commonName: 'two',
    })
    const moved = await loadOrCreateServerIdentity(directory, authority, { commonName: 'two' })
    expect(moved.authorityPem).toBe(authority.certificatePem)
    expect(judgeCertificate(new X509Certificate(moved.certificatePem), { authorityPem: authority.certificatePem, usage: 'server' }).ok).toBe(true)
  })

  test('a damaged authority is an error and is never replaced', async () => {
    const directory = join(root, 'c')
    const own = await loadOrCreateAuthority(directory, { name: 'recovery' })
    const path = join(directory, 'authority.pem')
    const other = await createAuthority({ name: 'recovery' })
    for (const damaged of ['', own.privateKeyPem, own.certificatePem, other.privateKeyPem + own.certificatePem, 'x'.repeat(100)]) {
      await writeFile(path, damaged, { mode: 0o600 })
      await expect(loadOrCreateAuthority(directory, { name: 'recovery' })).rejects.toMatchObject({ code: 'IO' })
      expect(await readPrivateFile(path)).toBe(damaged)
    }
  })

  test('a private file that others can read is refused', async () => {
    const directory = join(root, 'd')
    await loadOrCreateAuthority(directory, { name: 'recovery' })
    await chmod(join(directory, 'authority.pem'), 0o640)
    await expect(loadOrCreateAuthority(directory, { name: 'recovery' })).rejects.toMatchObject({
      code: 'IO',
      message: expect.stringContaining('can be read by others'),
    })
  })
})
