import type { Socket } from 'node:net'
import { CdpError, toCdpError } from '../errors/index.ts'
import { NBD_CMD_DISC, NBD_CMD_READ, NBD_CMD_WRITE } from './constants.ts'
import type { NbdExport } from './export.ts'
import { RequestParser, type RequestSink } from './request-parser.ts'
import { checkRequest, runRequest, type NbdRequest } from './request-runner.ts'
import { ServerHandshake, type HandshakeOptions, type NegotiatedSession } from './server-handshake.ts'

export type ConnectionLimits = {
  /** Requests under way on one connection: from their start until their reply has left the process. */
  maxRequestsInFlight: number
  /** Data of those requests; one request is always let through. */
  maxBytesInFlight: number
  handshakeDeadlineMs: number
}

export type ConnectionCounters = { requests: number; errorReplies: number; protocolErrors: number; readBytes: number; writtenBytes: number }

export type ConnectionOptions = {
  handshake: HandshakeOptions
  findExport(name: string): NbdExport | undefined
  limits: ConnectionLimits
  counters: ConnectionCounters
  /** The connection ended because of this; not called for a client that just leaves. */
  onError(error: CdpError): void
}

/** How long the replies sent before an error may take to leave. */
const LINGER_MS = 1_000

/**
 * One client of an NbdServer. Owns its socket. Backpressure: requests beyond the limits wait in a queue that holds at most what one chunk of the
 * socket contained, and the socket is paused while anything waits.
 */
export class ServerConnection implements RequestSink {
  /** Resolves when the socket is closed and no request of this client is under way; never rejects. */
  readonly done: Promise<void>
  readonly #socket: Socket
  readonly #options: ConnectionOptions
  readonly #handshake: ServerHandshake
  readonly #gone = new AbortController()
  /** Of the handshake at first, then of the last bytes of a connection that failed. */
  #deadline: NodeJS.Timeout
  #parser: RequestParser | undefined
  #served: NbdExport | undefined
  #session: NegotiatedSession = { exportName: '', structuredReplies: false, metaContexts: [] }
  #current: NbdRequest | undefined
  #currentFilledBytes = 0
  #queue: NbdRequest[] = []
  #inFlight = 0
  #inFlightBytes = 0
  #ending = false
  #socketClosed = false
  #corked = false
  #finish: () => void = () => undefined

  constructor(socket: Socket, options: ConnectionOptions) {
    this.#socket = socket
    this.#options = options
    this.#handshake = new ServerHandshake(options.handshake)
    this.done = new Promise((resolve) => {
      this.#finish = resolve
    })
    this.#deadline = setTimeout(() => {
      const context = { deadlineMs: options.limits.handshakeDeadlineMs }
      this.#fail(new CdpError('TIMEOUT', 'The NBD client did not finish its handshake in time.', { context }))
    }, options.limits.handshakeDeadlineMs)
    socket.on('data', (chunk: Buffer) => this.#onData(chunk))
    socket.on('drain', () => this.#pump())
    socket.on('error', (error) => this.#fail(toCdpError(error, 'IO')))
    socket.on('close', () => this.#onClose())
    socket.write(this.#handshake.greeting())
  }

  /** Ends the connection at once; await `done` after it. */
  destroy(): void {
    this.#ending = true
    this.#socket.destroy()
  }

  onRequest(type: number, flags: number, cookieHigh: number, cookieLow: number, offsetBytes: number, lengthBytes: number): void {
    const request: NbdRequest = { type, flags, cookieHigh, cookieLow, offsetBytes, lengthBytes }
    // A refused write keeps no data: its payload is parsed and dropped, the runner refuses it again when its turn comes.
    if (type === NBD_CMD_WRITE && this.#served && !checkRequest(this.#served, this.#session, request)) request.data = Buffer.allocUnsafe(lengthBytes)
    this.#current = request
    this.#currentFilledBytes = 0
  }

  onPayload(chunk: Buffer, start: number, end: number): void {
    if (this.#current?.data) chunk.copy(this.#current.data, this.#currentFilledBytes, start, end)
    this.#currentFilledBytes += end - start
  }

  onRequestEnd(): void {
    const request = this.#current
    this.#current = undefined
    if (request === undefined || this.#ending) return
    if (request.type === NBD_CMD_DISC) this.#ending = true
    else this.#queue.push(request)
  }

  #onData(chunk: Buffer): void {
    if (this.#ending) return
    try {
      if (this.#parser) this.#parser.push(chunk)
      else this.#negotiate(chunk)
    } catch (error) {
      this.#fail(toCdpError(error))
      return
    }
    this.#pump()
  }

  #negotiate(chunk: Buffer): void {
    const step = this.#handshake.push(chunk)
    for (const bytes of step.send) this.#socket.write(bytes)
    if (step.outcome?.is === 'aborted') this.#ending = true
    if (step.outcome?.is !== 'transmission') return
    clearTimeout(this.#deadline)
    const served = this.#options.findExport(step.outcome.session.exportName)
    if (!served) throw new CdpError('NBD_REFUSED', 'The export went away during the handshake.', { context: { exportName: step.outcome.session.exportName } })
    served.opened?.()
    this.#served = served
    this.#session = step.outcome.session
    this.#parser = new RequestParser(this, { maxPayloadBytes: served.blockSize.maxBytes })
    this.#parser.push(step.outcome.rest)
  }

  /** Starts what may start, then lets the socket run or stand accordingly. */
  #pump(): void {
    if (this.#socketClosed) return
    const { maxRequestsInFlight, maxBytesInFlight } = this.#options.limits
    let started = 0
    for (const request of this.#queue) {
      const dataBytes = dataBytesOf(request)
      if (this.#inFlight >= maxRequestsInFlight || (this.#inFlight > 0 && this.#inFlightBytes + dataBytes > maxBytesInFlight)) break
      started += 1
      this.#inFlight += 1
      this.#inFlightBytes += dataBytes
      void this.#run(request, dataBytes)
    }
    if (started > 0) this.#queue.splice(0, started)
    const busy = this.#queue.length > 0 || this.#inFlight >= maxRequestsInFlight || this.#inFlightBytes >= maxBytesInFlight
    // In the handshake a client that reads no replies is not read from either.
    if (busy || (!this.#parser && this.#socket.writableNeedDrain)) this.#socket.pause()
    else this.#socket.resume()
    if (this.#ending && this.#inFlight === 0 && this.#queue.length === 0) this.#socket.destroySoon()
  }

  async #run(request: NbdRequest, dataBytes: number): Promise<void> {
    const { counters } = this.#options
    counters.requests += 1
    const reply = this.#served ? await runRequest(this.#served, this.#session, request, this.#gone.signal) : { error: true, send: [] }
    if (reply.error) counters.errorReplies += 1
    else if (request.type === NBD_CMD_READ) counters.readBytes += dataBytes
    else if (request.type === NBD_CMD_WRITE) counters.writtenBytes += dataBytes
    const settled = (): void => {
      this.#inFlight -= 1
      this.#inFlightBytes -= dataBytes
      this.#pump()
      this.#finishIfIdle()
    }
    if (!this.#socket.writable) {
      settled()
      return
    }
    this.#corkTurn()
    reply.send.forEach((part, index) => {
      if (index === reply.send.length - 1) this.#socket.write(part, settled)
      else this.#socket.write(part)
    })
  }

  /** Replies that become ready in one turn of the event loop leave by one writev. */
  #corkTurn(): void {
    if (this.#corked) return
    this.#corked = true
    this.#socket.cork()
    process.nextTick(() => {
      this.#corked = false
      this.#socket.uncork()
    })
  }

  #fail(error: CdpError): void {
    if (this.#socketClosed) return
    const first = !this.#ending
    this.#ending = true
    this.#queue = []
    if (first) {
      if (error.code === 'NBD_PROTOCOL') this.#options.counters.protocolErrors += 1
      this.#options.onError(error)
    }
    this.#gone.abort(error)
    // What was answered before still goes out, unless the client does not read.
    clearTimeout(this.#deadline)
    this.#deadline = setTimeout(() => this.#socket.destroy(), LINGER_MS)
    this.#socket.destroySoon()
  }

  #onClose(): void {
    clearTimeout(this.#deadline)
    this.#socketClosed = true
    this.#ending = true
    this.#queue = []
    this.#current = undefined
    this.#gone.abort(new CdpError('CLOSED', 'The NBD client is gone.'))
    this.#finishIfIdle()
  }

  #finishIfIdle(): void {
    if (!this.#socketClosed || this.#inFlight > 0) return
    const served = this.#served
    this.#served = undefined
    try {
      served?.closed?.()
    } catch (error) {
      this.#options.onError(toCdpError(error))
    }
    this.#finish()
  }
}

const dataBytesOf = (request: NbdRequest): number =>
  request.type === NBD_CMD_READ || request.type === NBD_CMD_WRITE ? request.lengthBytes : 0
