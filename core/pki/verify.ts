import { X509Certificate } from 'node:crypto'
import { usageOids } from './authority.ts'
import type { CertificateUsage } from './authority.ts'

/** Why a peer's certificate is not trusted. */
export type Distrust = 'no-certificate' | 'wrong-authority' | 'expired' | 'not-yet-valid' | 'wrong-usage' | 'no-name'

export type Verdict = { ok: true; commonName: string; fingerprintSha256: string; notAfterUnixMs: number } | { ok: false; reason: Distrust }

/**
 * Judges a certificate by our own rules, beside what TLS has verified: signed directly by the pinned authority, valid now,
 * made for this usage, no authority itself, one CN. Host names play no part.
 */
export const judgeCertificate = (
  certificate: X509Certificate | undefined,
  expected: { authorityPem: string; usage: CertificateUsage; nowUnixMs?: () => number },
): Verdict => {
  if (certificate === undefined) return { ok: false, reason: 'no-certificate' }
  const authority = new X509Certificate(expected.authorityPem)
  if (!certificate.checkIssued(authority) || !certificate.verify(authority.publicKey)) return { ok: false, reason: 'wrong-authority' }
  const atUnixMs = (expected.nowUnixMs ?? Date.now)()
  const notAfterUnixMs = Math.min(certificate.validToDate.getTime(), authority.validToDate.getTime())
  if (atUnixMs > notAfterUnixMs) return { ok: false, reason: 'expired' }
  if (atUnixMs < certificate.validFromDate.getTime()) return { ok: false, reason: 'not-yet-valid' }
  if (certificate.ca || !authority.ca || !((certificate.keyUsage as string[] | undefined) ?? []).includes(usageOids[expected.usage]))
    return { ok: false, reason: 'wrong-usage' }
  const names = certificate.subject.split('\n').filter((part) => part.startsWith('CN='))
  const commonName = names[0]?.slice('CN='.length)
  if (names.length !== 1 || commonName === undefined || commonName === '') return { ok: false, reason: 'no-name' }
  return { ok: true, commonName, fingerprintSha256: certificate.fingerprint256.replaceAll(':', '').toLowerCase(), notAfterUnixMs }
}
