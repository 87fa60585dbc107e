import { connect } from 'node:tls'
import type { ConnectionOptions, TLSSocket } from 'node:tls'
import { CdpError, errorCode, errorMessage } from '../errors/index.ts'
import { clientTlsOptions } from '../pki/index.ts'
import type { ClientTls } from '../pki/index.ts'
import { keepAliveDelayMs } from './protocols.ts'
import type { nodeProtocol, pairProtocol, streamProtocol } from './protocols.ts'

export type ConnectOptions = {
  host: string
  port: number
  tls: ClientTls
  alpn: typeof streamProtocol | typeof pairProtocol | typeof nodeProtocol
  /** From now to the end of the handshake; 10 s if not given. */
  deadlineMs?: number
  nowUnixMs?: () => number
  signal?: AbortSignal
}

/**
 * Connects and verifies the server; the socket that comes back is the caller's, who attaches its listeners in the same turn.
 * Throws UNREACHABLE (nobody there), UNAUTHORIZED (the server is not the one we were paired with), TIMEOUT, ABORTED.
 * A server that does not accept *our* certificate closes only after this (TLS 1.3): the socket then ends without a byte.
 */
export const connectSecure = (options: ConnectOptions): Promise<TLSSocket> =>
  openTls({ ...options, tlsOptions: clientTlsOptions(options.tls, options.nowUnixMs === undefined ? {} : { nowUnixMs: options.nowUnixMs }) })

export type OpenTlsOptions = { host: string; port: number; alpn: string; tlsOptions: ConnectionOptions; deadlineMs?: number; signal?: AbortSignal }

export const openTls = async (options: OpenTlsOptions): Promise<TLSSocket> => {
  const { host, port, alpn } = options
  const deadlineMs = options.deadlineMs ?? 10_000
  const context = { host, port }
  if (options.signal?.aborted === true) throw new CdpError('ABORTED', 'the connection was given up', { context })
  const deadline = AbortSignal.timeout(deadlineMs)
  const signal = options.signal === undefined ? deadline : AbortSignal.any([deadline, options.signal])
  const socket = connect({ ...options.tlsOptions, host, port, ALPNProtocols: [alpn] })
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  const onSecure = (): void => resolve()
  const onAbort = (): void =>
    reject(
      deadline.aborted
        ? new CdpError('TIMEOUT', `no TLS connection to ${host} port ${port} within ${deadlineMs} ms`, { retry: true, context })
        : new CdpError('ABORTED', 'the connection was given up', { context }),
    )
  const onError = (error: Error): void => reject(explain(error, host, port))
  const onClose = (): void => reject(new CdpError('CLOSED', `${host} port ${port} closed the connection during the handshake`, { retry: true, context }))
  signal.addEventListener('abort', onAbort, { once: true })
  socket.once('secureConnect', onSecure).once('error', onError).once('close', onClose)
  try {
    await promise
    if (socket.alpnProtocol !== alpn)
      throw new CdpError('STREAM_PROTOCOL', `${host} port ${port} does not speak ${alpn}`, { hint: 'Is this the port of a pve-cdp agent?', context })
    return socket.setNoDelay(true).setKeepAlive(true, keepAliveDelayMs)
  } catch (error) {
    // The destroyed socket may still report an error of its own.
    socket.on('error', () => undefined).destroy()
    throw error
  } finally {
    signal.removeEventListener('abort', onAbort)
    socket.off('secureConnect', onSecure).off('error', onError).off('close', onClose)
  }
}

const unreachable = new Set(['ECONNREFUSED', 'EHOSTUNREACH', 'ENETUNREACH', 'ENOTFOUND', 'EAI_AGAIN', 'ETIMEDOUT', 'EHOSTDOWN', 'ECONNRESET', 'EPIPE'])

const explain = (error: Error, host: string, port: number): CdpError => {
  const context = { host, port }
  if (error instanceof CdpError) return new CdpError(error.code, error.message, { ...(error.hint === undefined ? {} : { hint: error.hint }), context })
  const code = errorCode(error) ?? ''
  if (unreachable.has(code)) {
    return new CdpError('UNREACHABLE', `${host} port ${port} cannot be reached: ${errorMessage(error)}`, {
      cause: error,
      retry: true,
      hint: 'Is the agent running there, and does a firewall let this port through?',
      context,
    })
  }
  if (code.startsWith('ERR_SSL_') || code.startsWith('EPROTO')) {
    return new CdpError('STREAM_PROTOCOL', `${host} port ${port} does not speak our TLS: ${errorMessage(error)}`, {
      cause: error,
      hint: 'Is this the port of a pve-cdp agent?',
      context,
    })
  }
  return new CdpError('UNAUTHORIZED', `the server at ${host} port ${port} is not trusted: ${errorMessage(error)}`, {
    cause: error,
    hint: 'It is not the site that this one was paired with, or its certificate has ended: look at both, then pair again.',
    context,
  })
}
