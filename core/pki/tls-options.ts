import { X509Certificate } from 'node:crypto'
import type { ConnectionOptions, TlsOptions } from 'node:tls'
import { CdpError } from '../errors/index.ts'
import { judgeCertificate } from './verify.ts'

/** Who we are towards a peer and whom we trust: all PEM, so that it can be posted to a worker thread. */
export type TlsIdentity = { certificatePem: string; privateKeyPem: string; authorityPem: string }

/** A client that trusts one authority; without certificate and key it is anonymous (pairing). */
export type ClientTls = { authorityPem: string } & (
  { certificatePem: string; privateKeyPem: string } | { certificatePem?: undefined; privateKeyPem?: undefined }
)

const versions = { minVersion: 'TLSv1.3', maxVersion: 'TLSv1.3' } as const

/**
 * TLS 1.3 for a listener. The chain that is sent ends in the authority, so that a site that is being paired can compare its
 * fingerprint. Client certificates are asked for and verified by OpenSSL; the handshake is not broken off for a client without
 * one, because pairing has none: core/link refuses it afterwards by what the verification said.
 */
export const serverTlsOptions = (identity: TlsIdentity): TlsOptions => ({
  ...versions,
  cert: identity.certificatePem + identity.authorityPem,
  key: identity.privateKeyPem,
  ca: identity.authorityPem,
  requestCert: true,
  rejectUnauthorized: false,
})

/** TLS 1.3 for a client: the server's certificate must be signed by the pinned authority and made for servers; its name is not looked at. */
export const clientTlsOptions = (tls: ClientTls, options: { nowUnixMs?: () => number } = {}): ConnectionOptions => ({
  ...versions,
  ca: tls.authorityPem,
  ...(tls.certificatePem === undefined ? {} : { cert: tls.certificatePem, key: tls.privateKeyPem }),
  rejectUnauthorized: true,
  checkServerIdentity: (_host, peer) => {
    const verdict = judgeCertificate(new X509Certificate(peer.raw), { authorityPem: tls.authorityPem, usage: 'server', ...options })
    return verdict.ok ? undefined : new CdpError('UNAUTHORIZED', `the server's certificate is not trusted: ${verdict.reason}`)
  },
})
