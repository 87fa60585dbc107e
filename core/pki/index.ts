// Keys and certificates: the recovery site's own authority, certificates for its listener and for the sites paired with it.
//
// ECDSA P-256, X.509 v3 (RFC 5280), requests in PKCS #10, everything in PEM at the border, so that identities can be stored
// and posted to worker threads. Made with @peculiar/x509 on node:crypto; judged with OpenSSL and with judgeCertificate.
// Called by agent/pairing, plugin/pairing, core/link and the daemons' main.ts.
//
// Trust is one pinned authority and a usage (server or client), never a host name and never the system's store. Private files
// are 0600 in directories 0700 and are replaced whole. The clock is passed in.
//
// This folder never opens a connection, never logs, never makes a new authority where a damaged one lies.
export { createAuthority, fingerprintSha256, issueCertificate } from './authority.ts'
export type { Authority, CertificateUsage, IssueOptions } from './authority.ts'
export { createCsr, createKeyPair, publicKeyOf, verifyCsr } from './keys.ts'
export type { KeyPair } from './keys.ts'
export { ensurePrivateDirectory, readPrivateFile, removePrivateFile, writePrivateFile } from './private-file.ts'
export { loadOrCreateAuthority, loadOrCreateServerIdentity, loadOrCreateSiteId } from './store.ts'
export { clientTlsOptions, serverTlsOptions } from './tls-options.ts'
export type { ClientTls, TlsIdentity } from './tls-options.ts'
export { judgeCertificate } from './verify.ts'
export type { Distrust, Verdict } from './verify.ts'
