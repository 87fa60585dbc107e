import { X509Certificate } from 'node:crypto'
import { CdpError } from '../../core/errors/index.ts'
import { connectSecure, pairProtocol, readServerChain } from '../../core/link/index.ts'
import { PairAnswer, parseToken, receiveMessage, sendMessage } from '../../core/pairing/index.ts'
import type { PairingToken } from '../../core/pairing/index.ts'
import { createCsr, createKeyPair, fingerprintSha256, judgeCertificate } from '../../core/pki/index.ts'
import { storePairing } from './pairing-file.ts'
import type { Pairing } from './pairing-file.ts'

export type JoinOptions = {
  /** As the operator pasted it. */
  token: string
  /** Our own site id. */
  siteId: string
  /** Where pairing.json goes (0700). */
  directory: string
  /** For each of the three steps: reading the chain, connecting, the answer. */
  deadlineMs?: number
  nowUnixMs?: () => number
  signal?: AbortSignal
}

/**
 * Pairs this site with the agent named in the token and stores the result, replacing an earlier pairing.
 * Throws BAD_INPUT (no token), UNREACHABLE, TIMEOUT, UNAUTHORIZED (another authority than the token's), PAIRING (refused).
 * Whenever it throws, an earlier pairing is as it was.
 */
export const joinSite = async (options: JoinOptions): Promise<Pairing> => {
  const token = parseToken(options.token)
  const nowUnixMs = options.nowUnixMs ?? Date.now
  const waits = { deadlineMs: options.deadlineMs ?? 10_000, ...(options.signal === undefined ? {} : { signal: options.signal }) }
  const to = { host: token.host, port: token.port, ...waits }

  const authorityPem = pinnedAuthority(await readServerChain(to), token)
  const keyPair = await createKeyPair()
  const csrPem = await createCsr({ commonName: options.siteId, keyPair })
  // From here on TLS itself verifies the server against the authority that the token names.
  const socket = await connectSecure({ ...to, tls: { authorityPem }, alpn: pairProtocol, nowUnixMs })
  let answer: PairAnswer | undefined
  try {
    socket.on('error', () => undefined)
    sendMessage(socket, { version: 1, secret: token.secret, siteId: options.siteId, csrPem })
    answer = await receiveMessage(socket, PairAnswer, waits)
  } finally {
    socket.destroy()
  }
  const context = { host: token.host, port: token.port }
  if (answer === undefined)
    throw new CdpError('PAIRING', 'the agent closed the connection without an answer', { retry: true, hint: "See the agent's log, then try again.", context })
  if (!answer.ok)
    throw new CdpError('PAIRING', `the agent refused the pairing: ${answer.message}`, { ...(answer.hint === undefined ? {} : { hint: answer.hint }), context })

  const certificate = readCertificate(answer.certificatePem)
  const verdict = judgeCertificate(certificate, { authorityPem, usage: 'client', nowUnixMs })
  const ours = certificate?.publicKey.export({ type: 'spki', format: 'pem' }).toString() === keyPair.publicKeyPem
  if (!verdict.ok || !ours || verdict.commonName !== options.siteId || answer.siteId !== options.siteId) {
    throw new CdpError('PAIRING', `the agent issued a certificate that does not fit: ${verdict.ok ? 'wrong key or name' : verdict.reason}`, {
      hint: verdict.ok || verdict.reason === 'wrong-authority' ? 'This is a bug or an attack: look at the agent.' : 'Are the clocks of both sites right?',
      context,
    })
  }
  const pairing: Pairing = {
    host: token.host,
    port: token.port,
    siteId: options.siteId,
    agentSiteId: answer.agentSiteId,
    pairedAtUnixMs: nowUnixMs(),
    certificateEndsAtUnixMs: verdict.notAfterUnixMs,
    tls: { certificatePem: answer.certificatePem, privateKeyPem: keyPair.privateKeyPem, authorityPem },
  }
  await storePairing(options.directory, pairing)
  return pairing
}

const pinnedAuthority = (chain: X509Certificate[], token: PairingToken): string => {
  const authority = chain.find((certificate) => fingerprintSha256(certificate) === token.caFingerprintSha256)
  if (authority === undefined) {
    throw new CdpError('UNAUTHORIZED', `the server at ${token.host} port ${token.port} is not the one that made this token`, {
      hint: 'Is the address right? If it is, somebody may stand between the sites: nothing was sent.',
      context: { host: token.host, port: token.port },
    })
  }
  return authority.toString()
}

const readCertificate = (pem: string): X509Certificate | undefined => {
  try {
    return new X509Certificate(pem)
  } catch {
    return undefined
  }
}
