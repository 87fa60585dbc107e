import { chmod, rm } from 'node:fs/promises'
import { connect, createServer, type Server, type Socket } from 'node:net'
import { CdpError, errorCode, toCdpError } from '../errors/index.ts'
import { describeAddress, transmissionFlagsOf, type NbdAddress, type NbdExport } from './export.ts'
import { ServerConnection, type ConnectionCounters, type ConnectionLimits } from './server-connection.ts'
import type { HandshakeExport, HandshakeOptions } from './server-handshake.ts'

export type NbdServerOptions = {
  /** `port` 0 lets the system choose; see NbdServer.address. */
  address: NbdAddress
  /** Asked whenever a client names an export, several times in one handshake; the last answer serves that connection to its end. */
  findExport(name: string): NbdExport | undefined
  listExports(): readonly NbdExport[]
  /** File mode of the unix socket. Default 0o600. */
  socketMode?: number
  /** Default 256; a client beyond it is closed at once and counted as refused. */
  maxConnections?: number
  limits?: Partial<ConnectionLimits>
  /** False to answer with simple replies only. Default true. */
  structuredReplies?: boolean
  /** A connection ended for another reason than its client leaving. */
  onConnectionError?(error: CdpError): void
}

export type NbdServerCounters = ConnectionCounters & { connections: number; openConnections: number; refusedConnections: number }

const DEFAULT_LIMITS: ConnectionLimits = { maxRequestsInFlight: 64, maxBytesInFlight: 64 * 1024 * 1024, handshakeDeadlineMs: 10_000 }

/** sockaddr_un holds 108 bytes with the final zero. */
const MAX_SOCKET_PATH_BYTES = 107

/** How long disposal waits for operations of exports that ignore their AbortSignal. */
const DISPOSE_WAIT_MS = 5_000

/** Serves NbdExports on one unix socket or TCP port. Start with `NbdServer.listen`, end with `await server[Symbol.asyncDispose]()`. */
export class NbdServer {
  readonly #options: NbdServerOptions
  readonly #handshake: HandshakeOptions
  readonly #limits: ConnectionLimits
  readonly #server: Server
  readonly #connections = new Set<ServerConnection>()
  readonly #counters: NbdServerCounters = {
    connections: 0, openConnections: 0, refusedConnections: 0, requests: 0, errorReplies: 0, protocolErrors: 0, readBytes: 0, writtenBytes: 0,
  }
  #address: NbdAddress
  #disposing: Promise<void> | undefined

  private constructor(options: NbdServerOptions) {
    this.#options = options
    this.#address = options.address
    this.#limits = { ...DEFAULT_LIMITS, ...options.limits }
    this.#handshake = {
      findExport: (name) => {
        const served = options.findExport(name)
        return served && handshakeViewOf(served)
      },
      listExports: () => options.listExports(),
      structuredReplies: options.structuredReplies ?? true,
    }
    this.#server = createServer({ noDelay: true, keepAlive: true }, (socket) => this.#accept(socket))
  }

  /**
   * A socket file that nobody serves is replaced. @throws CdpError CONFLICT when something answers on the address already, BAD_INPUT for a path that
   * is too long, IO otherwise
   */
  static async listen(options: NbdServerOptions): Promise<NbdServer> {
    const server = new NbdServer(options)
    await server.#listen()
    return server
  }

  /** Where clients find the server, with the port the system chose. */
  get address(): NbdAddress {
    return this.#address
  }

  /** A snapshot; counts since the start, bytes are payload. */
  get counters(): NbdServerCounters {
    return { ...this.#counters, openConnections: this.#connections.size }
  }

  /** Ends listening and every connection, removes the socket file, and waits for running operations of exports (up to 5 s). Idempotent. */
  [Symbol.asyncDispose](): Promise<void> {
    this.#disposing ??= this.#dispose()
    return this.#disposing
  }

  async #listen(): Promise<void> {
    const { address } = this.#options
    if ('path' in address && Buffer.byteLength(address.path) > MAX_SOCKET_PATH_BYTES) {
      throw new CdpError('BAD_INPUT', `The socket path ${address.path} is longer than the ${MAX_SOCKET_PATH_BYTES} bytes Linux allows.`, {
        hint: 'Choose a shorter directory.',
      })
    }
    try {
      await this.#bind()
    } catch (error) {
      if (errorCode(error) !== 'EADDRINUSE') throw toCdpError(error, 'IO')
      if (!('path' in address) || (await answers(address.path))) {
        throw new CdpError('CONFLICT', `Another server listens on ${describeAddress(address)} already.`, { cause: error })
      }
      await rm(address.path, { force: true })
      await this.#bind().catch((again: unknown) => {
        throw toCdpError(again, 'IO')
      })
    }
    if ('path' in address) await chmod(address.path, this.#options.socketMode ?? 0o600)
    const bound = this.#server.address()
    if (typeof bound === 'object' && bound !== null) this.#address = { host: bound.address, port: bound.port }
  }

  #bind(): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#server.once('error', reject)
      this.#server.listen({ ...this.#options.address }, () => {
        this.#server.removeListener('error', reject)
        // Later errors of a listening socket (out of descriptors) concern one accept; the server goes on.
        this.#server.on('error', (error) => this.#options.onConnectionError?.(toCdpError(error, 'IO')))
        resolve()
      })
    })
  }

  #accept(socket: Socket): void {
    if (this.#disposing || this.#connections.size >= (this.#options.maxConnections ?? 256)) {
      this.#counters.refusedConnections += 1
      socket.destroy()
      return
    }
    this.#counters.connections += 1
    const connection = new ServerConnection(socket, {
      handshake: this.#handshake,
      findExport: (name) => this.#options.findExport(name),
      limits: this.#limits,
      counters: this.#counters,
      onError: (error) => this.#options.onConnectionError?.(error),
    })
    this.#connections.add(connection)
    void connection.done.then(() => this.#connections.delete(connection))
  }

  async #dispose(): Promise<void> {
    const closed = new Promise<void>((resolve) => {
      this.#server.close(() => resolve())
    })
    for (const connection of this.#connections) connection.destroy()
    const gone = Promise.all([closed, ...Array.from(this.#connections, (connection) => connection.done)])
    let timer: NodeJS.Timeout | undefined
    const waited = new Promise<void>((resolve) => {
      timer = setTimeout(() => {
        const context = { connections: this.#connections.size, waitedMs: DISPOSE_WAIT_MS }
        this.#options.onConnectionError?.(new CdpError('TIMEOUT', 'Operations of NBD exports still run after their clients are gone.', { context }))
        resolve()
      }, DISPOSE_WAIT_MS)
    })
    await Promise.race([gone, waited])
    clearTimeout(timer)
  }
}

const handshakeViewOf = (served: NbdExport): HandshakeExport => ({
  name: served.name,
  sizeBytes: served.sizeBytes,
  transmissionFlags: transmissionFlagsOf(served),
  description: served.description,
  blockSize: served.blockSize,
  metaContexts: served.blockStatus ? served.metaContexts : [],
})

/** True if a server accepts on this socket file; a file left behind by a dead one refuses. */
const answers = (path: string): Promise<boolean> =>
  new Promise((resolve) => {
    const probe = connect({ path })
    probe.once('connect', () => {
      probe.destroy()
      resolve(true)
    })
    probe.once('error', () => resolve(false))
  })
