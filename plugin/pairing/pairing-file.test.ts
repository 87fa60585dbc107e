import { chmod, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals'
import { createAuthority, createKeyPair, issueCertificate } from '../../core/pki/index.ts'
import { loadPairing, removePairing, storePairing } from './pairing-file.ts'
import type { Pairing } from './pairing-file.ts'

let root: string
let pairing: Pairing
beforeAll(async () => {
  root = await mkdtemp('/tmp/cdp-pf-')
  const authority = await createAuthority({ name: 'recovery' })
  const keyPair = await createKeyPair()
  const certificatePem = await issueCertificate(authority, { commonName: 'site-a', publicKeyPem: keyPair.publicKeyPem, usage: 'client', validForMs: 1000 })
  pairing = {
    host: 'dr',
    port: 7402,
    siteId: 'site-a',
    agentSiteId: 'site-b',
    pairedAtUnixMs: 1,
    certificateEndsAtUnixMs: 2,
    tls: { certificatePem, privateKeyPem: keyPair.privateKeyPem, authorityPem: authority.certificatePem },
  }
})
afterAll(() => rm(root, { recursive: true, force: true }))

describe('pairing.json', () => {
  test('none, stored, replaced, removed', async () => {
    const directory = join(root, 'a')
    expect(await loadPairing(directory)).toBeUndefined()
    await storePairing(directory, pairing)
    await storePairing(directory, { ...pairing, host: 'dr2' })
    expect(await loadPairing(directory)).toEqual({ ...pairing, host: 'dr2' })
    await removePairing(directory)
    await removePairing(directory)
    expect(await loadPairing(directory)).toBeUndefined()
  })

  test('damaged at any place it is an error, not "unpaired"; readable by others it is refused', async () => {
    const directory = join(root, 'b')
    await storePairing(directory, pairing)
    const path = join(directory, 'pairing.json')
    const text = await readFile(path, 'utf8')
    const { privateKeyPem } = await createKeyPair()
    for (const damaged of [
      '',
      text.slice(0, -20),
      text.replace('"version":1', '"version":2'),
      text.replace('BEGIN CERTIFICATE', 'BEGIN RUBBISH'),
      text.replace(JSON.stringify(pairing.tls.privateKeyPem), JSON.stringify(privateKeyPem)),
    ]) {
      await writeFile(path, damaged)
      await expect(loadPairing(directory)).rejects.toMatchObject({ code: 'IO' })
    }
    await writeFile(path, text)
    await chmod(path, 0o644)
    await expect(loadPairing(directory)).rejects.toMatchObject({ code: 'IO', hint: expect.stringContaining('chmod 600') })
  })
})
