import { createPrivateKey, X509Certificate } from 'node:crypto'
import { join } from 'node:path'
import { Type } from '@sinclair/typebox'
import type { Static } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'
import { CdpError } from '../../core/errors/index.ts'
import { ensurePrivateDirectory, readPrivateFile, removePrivateFile, writePrivateFile } from '../../core/pki/index.ts'

const StoredPairing = Type.Object({
  version: Type.Literal(1),
  host: Type.String(),
  port: Type.Integer({ minimum: 1, maximum: 65_535 }),
  /** Our own id, the CN of our certificate. */
  siteId: Type.String(),
  agentSiteId: Type.String(),
  pairedAtUnixMs: Type.Number(),
  certificateEndsAtUnixMs: Type.Number(),
  /** What capture workers connect with. */
  tls: Type.Object({ certificatePem: Type.String(), privateKeyPem: Type.String(), authorityPem: Type.String() }),
})
export type Pairing = Omit<Static<typeof StoredPairing>, 'version'>

const fileName = 'pairing.json'

/** The pairing kept in `directory`, or undefined. Throws IO when it is damaged or readable by others. */
export const loadPairing = async (directory: string): Promise<Pairing | undefined> => {
  const path = join(directory, fileName)
  const text = await readPrivateFile(path)
  if (text === undefined) return undefined
  try {
    const stored: unknown = JSON.parse(text)
    if (Value.Check(StoredPairing, stored) && new X509Certificate(stored.tls.certificatePem).checkPrivateKey(createPrivateKey(stored.tls.privateKeyPem))) {
      const { host, port, siteId, agentSiteId, pairedAtUnixMs, certificateEndsAtUnixMs, tls } = stored
      return { host, port, siteId, agentSiteId, pairedAtUnixMs, certificateEndsAtUnixMs, tls }
    }
  } catch (error) {
    throw damaged(path, error)
  }
  throw damaged(path)
}

/** Replaces the pairing whole; durable when this returns. */
export const storePairing = async (directory: string, pairing: Pairing): Promise<void> => {
  await ensurePrivateDirectory(directory)
  await writePrivateFile(join(directory, fileName), `${JSON.stringify({ version: 1, ...pairing })}\n`)
}

export const removePairing = async (directory: string): Promise<void> => removePrivateFile(join(directory, fileName))

const damaged = (path: string, cause?: unknown): CdpError =>
  new CdpError('IO', `${path} is damaged`, { cause, hint: 'Restore it from a backup, or remove it and pair the site again.', context: { path } })
