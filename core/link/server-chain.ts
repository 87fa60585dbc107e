import type { X509Certificate } from 'node:crypto'
import type { TLSSocket } from 'node:tls'
import { openTls } from './connect.ts'
import { pairProtocol } from './protocols.ts'

const maxChainLength = 4
const closeWithinMs = 1000

/**
 * The certificates that a server shows, its own first, *not verified*. For pairing only, where trust begins with a fingerprint:
 * the connection is closed without a byte sent, and what is then said is said over a second one that verifies.
 */
export const readServerChain = async (options: { host: string; port: number; deadlineMs?: number; signal?: AbortSignal }): Promise<X509Certificate[]> => {
  const socket = await openTls({ ...options, alpn: pairProtocol, tlsOptions: { minVersion: 'TLSv1.3', maxVersion: 'TLSv1.3', rejectUnauthorized: false } })
  try {
    const chain: X509Certificate[] = []
    for (let at = socket.getPeerX509Certificate(); at !== undefined && chain.length < maxChainLength; at = at.issuerCertificate) {
      if (chain.some((seen) => seen.fingerprint256 === at?.fingerprint256)) break
      chain.push(at)
    }
    return chain
  } finally {
    await endQuietly(socket)
  }
}

// An orderly end, so that the server does not take it for a broken handshake; one that does not close is left.
const endQuietly = async (socket: TLSSocket): Promise<void> => {
  const { promise, resolve } = Promise.withResolvers<void>()
  socket
    .on('error', () => resolve())
    .once('close', () => resolve())
    .setTimeout(closeWithinMs, () => resolve())
    .resume()
    .end()
  await promise
  socket.destroy()
}
