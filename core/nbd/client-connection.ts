import { connect, type Socket } from 'node:net'
import { CdpError, errorMessage, toCdpError } from '../errors/index.ts'
import { ClientHandshake, type ClientHandshakeOptions, type ClientSession } from './client-handshake.ts'
import { NBD_CMD_DISC, NBD_REQUEST_MAGIC, REQUEST_HEADER_BYTES } from './constants.ts'
import { RequestTable } from './client-requests.ts'
import { describeAddress, type NbdAddress } from './export.ts'
import { ReplyParser } from './reply-parser.ts'
import { writeU64 } from './u64.ts'

/** One buffer per connection that the socket reads into; replies are copied from it to where they belong. */
const RECEIVE_BUFFER_BYTES = 256 * 1024
/** How long the server may take to close after NBD_CMD_DISC. */
const DISCONNECT_WAIT_MS = 2_000

export type OpenOptions = ClientHandshakeOptions & {
  /** For connecting and the handshake together, from now. */
  deadlineMs: number
  maxRequestsInFlight: number
  signal?: AbortSignal | undefined
}

/** A client's socket with its handshake behind it: requests go out, replies reach the table. Owns the socket. */
export class ClientConnection {
  readonly session: ClientSession
  readonly table: RequestTable
  /** Resolves when the socket is closed, whoever closed it; never rejects. */
  readonly closed: Promise<void>
  readonly #socket: Socket
  #disconnecting: Promise<boolean> | undefined

  private constructor(socket: Socket, session: ClientSession, table: RequestTable, closed: Promise<void>) {
    this.#socket = socket
    this.session = session
    this.table = table
    this.closed = closed
  }

  /** @throws CdpError UNREACHABLE (nobody listens), TIMEOUT, ABORTED, NBD_REFUSED, NBD_PROTOCOL, CLOSED, BAD_INPUT */
  static async open(address: NbdAddress, options: OpenOptions): Promise<ClientConnection> {
    if (options.signal?.aborted) throw new CdpError('ABORTED', 'The NBD connection was given up.', { cause: options.signal.reason })
    if (!(options.maxRequestsInFlight >= 1)) throw new CdpError('BAD_INPUT', 'An NBD client needs room for at least one request.')
    const where = describeAddress(address)
    const context = { address: where }
    const handshake = new ClientHandshake(options)
    const opened = Promise.withResolvers<ClientConnection>()
    const closed = Promise.withResolvers<void>()
    let table: RequestTable | undefined
    let parser: ReplyParser | undefined
    let connected = false
    const fail = (error: CdpError): void => {
      opened.reject(error)
      table?.failAll(error)
      socket.destroy()
    }
    const receive = (bytes: Buffer): void => {
      if (parser) {
        parser.push(bytes)
        return
      }
      const step = handshake.push(bytes)
      for (const part of step.send) socket.write(part)
      if (!step.outcome) return
      table = new RequestTable(step.outcome.session, options.maxRequestsInFlight)
      parser = new ReplyParser(table)
      opened.resolve(new ClientConnection(socket, step.outcome.session, table, closed.promise))
      parser.push(step.outcome.rest)
    }
    const buffer = Buffer.allocUnsafeSlow(RECEIVE_BUFFER_BYTES)
    const socket = connect({
      ...address,
      noDelay: true,
      keepAlive: true,
      onread: {
        buffer,
        callback: (lengthBytes) => {
          try {
            receive(buffer.subarray(0, lengthBytes))
          } catch (error) {
            fail(toCdpError(error, 'NBD_PROTOCOL'))
          }
          return true
        },
      },
    })
    socket.once('connect', () => {
      connected = true
    })
    socket.on('error', (error) => {
      if (connected) {
        fail(new CdpError('CLOSED', `The connection to the NBD server ${where} broke: ${errorMessage(error)}.`, { cause: error, retry: true, context }))
      }
      else fail(new CdpError('UNREACHABLE', `No NBD server answers on ${where}: ${errorMessage(error)}.`, { cause: error, retry: true, context }))
    })
    socket.on('close', () => {
      fail(new CdpError('CLOSED', `The NBD server ${where} closed the connection.`, { retry: true, context }))
      closed.resolve()
    })
    const timer = setTimeout(() => {
      fail(new CdpError('TIMEOUT', `The NBD server ${where} did not finish the handshake in ${options.deadlineMs} ms.`, { retry: true, context }))
    }, options.deadlineMs)
    const onAbort = (): void => fail(new CdpError('ABORTED', 'The NBD connection was given up.', { cause: options.signal?.reason }))
    options.signal?.addEventListener('abort', onAbort, { once: true })
    try {
      return await opened.promise
    } finally {
      clearTimeout(timer)
      options.signal?.removeEventListener('abort', onAbort)
    }
  }

  /** Sends a request; `data` must stay as it is until the reply. */
  send(type: number, flags: number, cookieHigh: number, cookieLow: number, offsetBytes: number, lengthBytes: number, data?: Uint8Array): void {
    const header = Buffer.allocUnsafe(REQUEST_HEADER_BYTES)
    header.writeUInt32BE(NBD_REQUEST_MAGIC, 0)
    header.writeUInt16BE(flags, 4)
    header.writeUInt16BE(type, 6)
    header.writeUInt32BE(cookieHigh, 8)
    header.writeUInt32BE(cookieLow, 12)
    writeU64(header, offsetBytes, 16)
    header.writeUInt32BE(lengthBytes, 24)
    if (!data) {
      this.#socket.write(header)
      return
    }
    this.#socket.cork()
    this.#socket.write(header)
    this.#socket.write(data)
    this.#socket.uncork()
  }

  /**
   * NBD_CMD_DISC, then the end; requests under way are rejected with CLOSED. Idempotent. @returns false if the server did not close within waitMs
   * and the socket was destroyed
   */
  disconnect(waitMs = DISCONNECT_WAIT_MS): Promise<boolean> {
    this.#disconnecting ??= this.#disconnect(waitMs)
    return this.#disconnecting
  }

  async #disconnect(waitMs: number): Promise<boolean> {
    let clean = true
    this.table.failAll(new CdpError('CLOSED', 'The NBD client was closed.'))
    if (this.#socket.writable) {
      this.send(NBD_CMD_DISC, 0, 0, 0, 0, 0)
      this.#socket.end()
    }
    const timer = setTimeout(() => {
      clean = false
      this.#socket.destroy()
    }, waitMs)
    await this.closed
    clearTimeout(timer)
    return clean
  }
}
