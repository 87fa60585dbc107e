import { createServer as createTcpServer } from 'node:net'
import type { AddressInfo, Socket } from 'node:net'
import { createServer as createTlsServer } from 'node:tls'
import type { TLSSocket } from 'node:tls'
import { CdpError, errorCode, errorMessage } from '../errors/index.ts'
import type { Logger } from '../log/index.ts'
import { judgeCertificate, serverTlsOptions } from '../pki/index.ts'
import type { Distrust, TlsIdentity } from '../pki/index.ts'
import { keepAliveDelayMs, nodeProtocol, pairProtocol, streamProtocol } from './protocols.ts'
import { RefusalLog } from './refusal-log.ts'

/** A verified peer: the site id is the CN of a certificate that our authority signed for clients. */
export type PeerIdentity = { siteId: string; fingerprintSha256: string; certificateEndsAtUnixMs: number; address: string; port: number }

/** Why a connection was not handed over. `not-admitted`: the certificate is genuine, but `admit` said no (replaced by a re-pairing). */
export type Refusal =
  Distrust | 'not-verified' | 'not-admitted' | 'unknown-protocol' | 'handshake-failed' | 'handshake-timeout' | 'session-resumed' | 'too-many-half-open'

export type LinkCounters = { accepted: number; halfOpen: number; open: number; refused: Partial<Record<Refusal, number>> }

export type ListenOptions = {
  host: string
  /** 0: any free port; see `port` of the result. */
  port: number
  tls: TlsIdentity
  log: Logger
  /** Takes over a verified stream. It attaches its listeners before it returns. */
  onStream?: (socket: TLSSocket, peer: PeerIdentity) => void
  /** Takes over a connection without a client certificate, for pairing. */
  onPair?: (socket: TLSSocket) => void
  /** Takes over a verified connection of another node of the cluster; `siteId` is that node's name. */
  onNode?: (socket: TLSSocket, peer: PeerIdentity) => void
  /** A second look at a genuine peer: a reason to refuse it, or undefined. */
  admit?: (peer: PeerIdentity) => string | undefined
  /** From the TCP connection to the end of the TLS handshake. */
  handshakeDeadlineMs?: number
  /** Connections in the middle of their handshake; further ones are closed at once. */
  maxHalfOpen?: number
  nowUnixMs?: () => number
}

export type SecureListener = {
  readonly host: string
  readonly port: number
  counters(): LinkCounters
  /** New connections see this identity; open ones stay. */
  replaceIdentity(tls: TlsIdentity): void
  /** Stops listening and ends every connection that is still open. */
  [Symbol.asyncDispose](): Promise<void>
}

/** Listens on one TLS port for streams and pairings. Throws IO when the port cannot be had. */
export const listenSecure = async (options: ListenOptions): Promise<SecureListener> => {
  const { log } = options
  const maxHalfOpen = options.maxHalfOpen ?? 64
  const refusals = new RefusalLog<Refusal>(log)
  const halfOpen = new Map<string, Socket>()
  const open = new Set<TLSSocket>()
  let tls = options.tls
  let accepted = 0

  const secure = createTlsServer({
    ...serverTlsOptions(tls),
    ALPNProtocols: [...(options.onStream ? [streamProtocol] : []), ...(options.onPair ? [pairProtocol] : []), ...(options.onNode ? [nodeProtocol] : [])],
    handshakeTimeout: options.handshakeDeadlineMs ?? 10_000,
  })
  const tcp = createTcpServer({ noDelay: true, keepAlive: true, keepAliveInitialDelay: keepAliveDelayMs }, (socket) => {
    const key = peerKey(socket)
    socket.on('error', (error) => log.debug('connection broke', { address: socket.remoteAddress, error }))
    if (key === undefined) {
      socket.destroy()
      return
    }
    if (halfOpen.size >= maxHalfOpen) {
      refusals.refuse('too-many-half-open', { address: socket.remoteAddress, port: socket.remotePort })
      socket.destroy()
      return
    }
    halfOpen.set(key, socket)
    socket.once('close', () => halfOpen.delete(key))
    secure.emit('connection', socket)
  })

  secure.on('tlsClientError', (error, socket) => {
    const timedOut = errorCode(error) === 'ERR_TLS_HANDSHAKE_TIMEOUT'
    refusals.refuse(timedOut ? 'handshake-timeout' : 'handshake-failed', {
      address: socket.remoteAddress,
      port: socket.remotePort,
      detail: errorMessage(error).slice(0, 200),
    })
    socket.destroy()
  })
  secure.on('secureConnection', (socket) => {
    const key = peerKey(socket)
    if (key !== undefined) halfOpen.delete(key)
    socket.on('error', (error) => log.debug('connection broke', { address: socket.remoteAddress, error }))
    const outcome = admission(socket, { ...options, tls })
    if ('refusal' in outcome) {
      refusals.refuse(outcome.refusal, {
        address: socket.remoteAddress,
        port: socket.remotePort,
        ...(outcome.detail === undefined ? {} : { detail: outcome.detail }),
      })
      socket.destroy()
      return
    }
    accepted += 1
    open.add(socket)
    socket.once('close', () => open.delete(socket))
    try {
      if (outcome.peer === undefined) options.onPair?.(socket)
      else if (socket.alpnProtocol === nodeProtocol) options.onNode?.(socket, outcome.peer)
      else options.onStream?.(socket, outcome.peer)
    } catch (error) {
      log.error('a connection could not be taken over', { address: socket.remoteAddress, error })
      socket.destroy()
    }
  })

  await new Promise<void>((resolve, reject) => {
    tcp.once('error', (error) =>
      reject(
        new CdpError('IO', `cannot listen on ${options.host} port ${options.port}: ${errorMessage(error)}`, {
          cause: error,
          hint: 'Choose another port or address, or stop what uses it.',
        }),
      ),
    )
    tcp.listen({ host: options.host, port: options.port }, resolve)
  })
  tcp.removeAllListeners('error').on('error', (error) => log.error('listener failed', { error }))
  const address = tcp.address() as AddressInfo

  let closing: Promise<void> | undefined
  return {
    host: address.address,
    port: address.port,
    counters: () => ({ accepted, halfOpen: halfOpen.size, open: open.size, refused: refusals.counts() }),
    replaceIdentity: (next) => {
      tls = next
      secure.setSecureContext(serverTlsOptions(next))
    },
    [Symbol.asyncDispose]: () =>
      (closing ??= new Promise<void>((resolve) => {
        tcp.close(() => resolve())
        for (const socket of halfOpen.values()) socket.destroy()
        for (const socket of open) socket.destroy()
      })),
  }
}

/** Whose client shows a certificate. */
const verified = new Set<string | false | null>([streamProtocol, nodeProtocol])

type Admission = { peer: PeerIdentity | undefined } | { refusal: Refusal; detail?: string }

const admission = (socket: TLSSocket, options: Pick<ListenOptions, 'tls' | 'admit' | 'nowUnixMs'>): Admission => {
  // A resumed session skips the certificate's verification; our own clients never resume.
  if (socket.isSessionReused()) return { refusal: 'session-resumed' }
  if (socket.alpnProtocol === pairProtocol) return { peer: undefined }
  if (!verified.has(socket.alpnProtocol)) return { refusal: 'unknown-protocol' }
  const verdict = judgeCertificate(socket.getPeerX509Certificate(), {
    authorityPem: options.tls.authorityPem,
    usage: 'client',
    ...(options.nowUnixMs === undefined ? {} : { nowUnixMs: options.nowUnixMs }),
  })
  if (!verdict.ok) return { refusal: verdict.reason }
  if (!socket.authorized) return { refusal: 'not-verified', detail: String(socket.authorizationError) }
  const { remoteAddress, remotePort } = socket
  if (remoteAddress === undefined || remotePort === undefined) return { refusal: 'handshake-failed', detail: 'closed by the peer' }
  const peer = {
    siteId: verdict.commonName,
    fingerprintSha256: verdict.fingerprintSha256,
    certificateEndsAtUnixMs: verdict.notAfterUnixMs,
    address: remoteAddress,
    port: remotePort,
  }
  const objection = options.admit?.(peer)
  return objection === undefined ? { peer } : { refusal: 'not-admitted', detail: objection }
}

const peerKey = (socket: Socket): string | undefined => (socket.remotePort === undefined ? undefined : `${socket.remoteAddress} ${socket.remotePort}`)
