import { createPrivateKey, randomUUID, X509Certificate } from 'node:crypto'
import { join } from 'node:path'
import { CdpError, errorMessage } from '../errors/index.ts'
import { createAuthority, issueCertificate } from './authority.ts'
import type { Authority } from './authority.ts'
import { createKeyPair } from './keys.ts'
import { ensurePrivateDirectory, readPrivateFile, writePrivateFile } from './private-file.ts'
import type { TlsIdentity } from './tls-options.ts'
import { judgeCertificate } from './verify.ts'

// One file per pair of key and certificate, so that there is never one without the other:
//   <directory>/authority.pem   key and certificate of the authority
//   <directory>/server.pem      key and certificate of the listener
//   <directory>/site-id         the site's own id (a UUID), made once
const serverValidForMs = 730 * 86_400_000

/** The authority kept in `directory`, made at the first call. A damaged one is an error: a new one would unpair every site. */
export const loadOrCreateAuthority = async (directory: string, options: { name: string; nowUnixMs?: () => number }): Promise<Authority> => {
  await ensurePrivateDirectory(directory)
  const path = join(directory, 'authority.pem')
  const text = await readPrivateFile(path)
  if (text !== undefined) return parsePair(path, text)
  const authority = await createAuthority(options)
  await writePrivateFile(path, authority.privateKeyPem + authority.certificatePem)
  return authority
}

/**
 * The listener's identity kept in `directory`; issued anew when there is none, when less than a quarter of its life is left,
 * when another authority issued it, or when its name changed. Peers trust the authority, so a new one disturbs nobody.
 */
export const loadOrCreateServerIdentity = async (
  directory: string,
  authority: Authority,
  options: { commonName: string; subjectAltNames?: string[]; nowUnixMs?: () => number },
): Promise<TlsIdentity> => {
  await ensurePrivateDirectory(directory)
  const path = join(directory, 'server.pem')
  const nowUnixMs = options.nowUnixMs ?? Date.now
  const text = await readPrivateFile(path)
  if (text !== undefined) {
    const stored = parsePair(path, text)
    const verdict = judgeCertificate(new X509Certificate(stored.certificatePem), { authorityPem: authority.certificatePem, usage: 'server', nowUnixMs })
    if (verdict.ok && verdict.commonName === options.commonName && verdict.notAfterUnixMs - nowUnixMs() > serverValidForMs / 4) {
      return { ...stored, authorityPem: authority.certificatePem }
    }
  }
  const keyPair = await createKeyPair()
  const certificatePem = await issueCertificate(authority, { ...options, publicKeyPem: keyPair.publicKeyPem, usage: 'server', validForMs: serverValidForMs })
  await writePrivateFile(path, keyPair.privateKeyPem + certificatePem)
  return { certificatePem, privateKeyPem: keyPair.privateKeyPem, authorityPem: authority.certificatePem }
}

/** The id of this site, made at the first call and never changed. */
export const loadOrCreateSiteId = async (directory: string): Promise<string> => {
  await ensurePrivateDirectory(directory)
  const path = join(directory, 'site-id')
  const stored = (await readPrivateFile(path))?.trim()
  if (stored !== undefined) {
    if (/^[0-9a-f-]{36}$/.test(stored)) return stored
    throw new CdpError('IO', `${path} does not hold a site id`, {
      hint: 'Restore the file from a backup, or remove it and pair the sites again.',
      context: { path },
    })
  }
  const siteId = randomUUID()
  await writePrivateFile(path, `${siteId}\n`)
  return siteId
}

const parsePair = (path: string, text: string): Authority => {
  const privateKeyPem = block(text, 'PRIVATE KEY')
  const certificatePem = block(text, 'CERTIFICATE')
  const damaged = (why: string, cause?: unknown): CdpError =>
    new CdpError('IO', `${path} is damaged: ${why}`, {
      hint: 'Restore the file from a backup. Without it, remove it and pair all sites again.',
      cause,
      context: { path },
    })
  if (privateKeyPem === undefined || certificatePem === undefined) throw damaged('it does not hold one key and one certificate')
  let matches: boolean
  try {
    matches = new X509Certificate(certificatePem).checkPrivateKey(createPrivateKey(privateKeyPem))
  } catch (error) {
    throw damaged(errorMessage(error), error)
  }
  if (!matches) throw damaged('key and certificate do not belong together')
  return { privateKeyPem, certificatePem }
}

const block = (text: string, label: string): string | undefined => {
  const match = new RegExp(`-----BEGIN ${label}-----[^-]+-----END ${label}-----`).exec(text)
  return match === null ? undefined : `${match[0]}\n`
}
