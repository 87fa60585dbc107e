import { randomBytes, webcrypto, X509Certificate } from 'node:crypto'
import type { Extension } from '@peculiar/x509'
import { CdpError } from '../errors/index.ts'
import { checkCommonName, createKeyPair, importPrivateKey, importPublicKey, signingAlgorithm, verifyCsr } from './keys.ts'
import { loadX509 } from './x509-library.ts'

/** A certification authority of one recovery site: its certificate (self-signed) and its key. */
export type Authority = { certificatePem: string; privateKeyPem: string }

export type CertificateUsage = 'server' | 'client'
export const usageOids: Record<CertificateUsage, string> = { server: '1.3.6.1.5.5.7.3.1', client: '1.3.6.1.5.5.7.3.2' }

const dayMs = 86_400_000
const authorityValidForMs = 3652 * dayMs
/** Certificates are valid from an hour before they were issued: two sites' clocks are never quite the same. */
const backdatedByMs = 3_600_000

/** A new authority, valid for ten years. It may sign certificates, but no further authorities. */
export const createAuthority = async (options: { name: string; validForMs?: number; nowUnixMs?: () => number }): Promise<Authority> => {
  const x509 = await loadX509()
  const atUnixMs = (options.nowUnixMs ?? Date.now)()
  const keyPair = await createKeyPair()
  const keys = { privateKey: await importPrivateKey(keyPair.privateKeyPem), publicKey: await importPublicKey(keyPair.publicKeyPem) }
  const certificate = await x509.X509CertificateGenerator.createSelfSigned(
    {
      name: [{ CN: [checkCommonName(options.name)] }],
      serialNumber: newSerialNumber(),
      notBefore: new Date(atUnixMs - backdatedByMs),
      notAfter: new Date(atUnixMs + (options.validForMs ?? authorityValidForMs)),
      signingAlgorithm,
      keys,
      extensions: [
        new x509.BasicConstraintsExtension(true, 0, true),
        new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.cRLSign, true),
        await x509.SubjectKeyIdentifierExtension.create(keys.publicKey, false, webcrypto),
      ],
    },
    webcrypto,
  )
  return { certificatePem: `${certificate.toString('pem')}\n`, privateKeyPem: keyPair.privateKeyPem }
}

export type IssueOptions = {
  /** A site id or host name. With a CSR it must be the name that the CSR asks for. */
  commonName: string
  usage: CertificateUsage
  /** IP addresses and DNS names; for people and foreign tools, our own peers do not rely on them. */
  subjectAltNames?: string[]
  /** Never beyond the authority's own end. */
  validForMs: number
  nowUnixMs?: () => number
} & ({ publicKeyPem: string; csrPem?: never } | { csrPem: string; publicKeyPem?: never })

/** A certificate (PEM) for one usage. Throws BAD_INPUT for a CSR that does not verify or asks for another name. */
export const issueCertificate = async (authority: Authority, options: IssueOptions): Promise<string> => {
  const x509 = await loadX509()
  const atUnixMs = (options.nowUnixMs ?? Date.now)()
  const commonName = checkCommonName(options.commonName)
  let publicKeyPem = options.publicKeyPem
  if (options.csrPem !== undefined) {
    const csr = await verifyCsr(options.csrPem)
    if (csr.commonName !== commonName) throw new CdpError('BAD_INPUT', `the certificate signing request asks for "${csr.commonName}", not for "${commonName}"`)
    publicKeyPem = csr.publicKeyPem
  }
  if (publicKeyPem === undefined) throw new CdpError('INTERNAL', 'issueCertificate without a key')
  const publicKey = await importPublicKey(publicKeyPem)
  const issuer = new x509.X509Certificate(authority.certificatePem)
  const extensions: Extension[] = [
    new x509.BasicConstraintsExtension(false, undefined, true),
    new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
    new x509.ExtendedKeyUsageExtension([usageOids[options.usage]], true),
    await x509.SubjectKeyIdentifierExtension.create(publicKey, false, webcrypto),
    await x509.AuthorityKeyIdentifierExtension.create(issuer.publicKey, false, webcrypto),
  ]
  const names = (options.subjectAltNames ?? []).map((value) => ({ type: /^[\d.]+$|:/.test(value) ? ('ip' as const) : ('dns' as const), value }))
  if (names.length > 0) extensions.push(new x509.SubjectAlternativeNameExtension(names))
  const certificate = await x509.X509CertificateGenerator.create(
    {
      subject: [{ CN: [commonName] }],
      issuer: issuer.subjectName,
      serialNumber: newSerialNumber(),
      notBefore: new Date(Math.max(atUnixMs - backdatedByMs, issuer.notBefore.getTime())),
      notAfter: new Date(Math.min(atUnixMs + options.validForMs, issuer.notAfter.getTime())),
      signingAlgorithm,
      publicKey,
      signingKey: await importPrivateKey(authority.privateKeyPem),
      extensions,
    },
    webcrypto,
  )
  return `${certificate.toString('pem')}\n`
}

/** SHA-256 over the DER of a certificate, 64 lower-case hex digits. */
export const fingerprintSha256 = (certificate: string | X509Certificate): string =>
  (typeof certificate === 'string' ? new X509Certificate(certificate) : certificate).fingerprint256.replaceAll(':', '').toLowerCase()

// 127 random bits with the top one set: positive and of one length, as RFC 5280 section 4.1.2.2 wants it.
const newSerialNumber = (): string => {
  const bytes = randomBytes(16)
  bytes[0] = ((bytes[0] ?? 0) & 0x7f) | 0x40
  return bytes.toString('hex')
}
