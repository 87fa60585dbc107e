import { randomBytes } from 'node:crypto'
import { createConnection } from 'node:net'
import type { Socket } from 'node:net'
import { CdpError, errorCode, errorMessage } from '../errors/index.ts'
import { QmpParser } from './qmp-parser.ts'
import type { QmpEvent, QmpGreeting, QmpMessage, QmpVersion } from './qmp-parser.ts'

export type QmpConnectOptions = {
  /** How long to wait for the greeting and the capabilities, in all. Default 5000. */
  deadlineMs?: number
  /** Default for every command. Default 5000. */
  commandDeadlineMs?: number
  maxLineBytes?: number
  /** How long closing waits for answers still under way. Default 500. */
  lingerMs?: number
  signal?: AbortSignal
}

export type QmpExecuteOptions = { deadlineMs?: number; signal?: AbortSignal }

export type QmpWaitOptions = {
  deadlineMs: number
  /** Events from this mark on count (see `eventMark`). Default: those since the last command was sent. */
  sinceMark?: number
  signal?: AbortSignal
}

/** What plugin/qemu needs of a connection: tests pass recorders of the same shape. */
export type Qmp = Pick<QmpClient, 'execute' | 'waitForEvent' | 'eventMark' | 'version'>

type Waiting = { resolve: (value: unknown) => void; reject: (error: unknown) => void; command: string; stop: () => void }
type Watching = { check: (event: QmpEvent) => void; reject: (error: unknown) => void }

const maxEvents = 1024
const defaultDeadlineMs = 5000

const connectError = (socketPath: string, cause: unknown): CdpError => {
  const code = errorCode(cause)
  const context = { socketPath, osCode: code }
  if (code === 'ENOENT' || code === 'ECONNREFUSED') return new CdpError('NOT_FOUND', `No QEMU listens on ${socketPath}`, { cause, context, hint: 'Is the VM running?' })
  if (code === 'EAGAIN') return new CdpError('CONFLICT', `Too many programs wait for ${socketPath}`, { cause, context, retry: true })
  return new CdpError('IO', `Cannot connect to ${socketPath}: ${errorMessage(cause)}`, { cause, context })
}

/**
 * One QMP connection. Made by `connect`; closed by `close`, by disposal, by a protocol error or by the peer.
 * The answer to a command whose sender hung up is delivered by QEMU to the *next* client (seen on 10.0.2). So the ids of each
 * connection begin with a random prefix of its own, answers to other ids are dropped, and closing waits a moment for answers
 * that are still under way: on a Proxmox node they would otherwise reach Proxmox, which takes them for an error.
 */
export class QmpClient {
  readonly #socket: Socket
  readonly #parser: QmpParser
  readonly #commandDeadlineMs: number
  readonly #lingerMs: number
  readonly #waiting = new Map<string, Waiting>()
  readonly #unanswered = new Set<string>()
  readonly #idPrefix = `cdp-${randomBytes(8).toString('hex')}-`
  readonly #watching = new Set<Watching>()
  readonly #events: QmpEvent[] = []
  readonly #closed = Promise.withResolvers<void>()
  readonly #greeted = Promise.withResolvers<QmpGreeting>()
  #droppedEvents = 0
  #markAtCommand = 0
  #nextId = 1
  #version: QmpVersion = { major: 0, minor: 0, micro: 0, package: '' }
  #end: CdpError | undefined
  #lingering: NodeJS.Timeout | undefined

  private constructor(socketPath: string, options: QmpConnectOptions) {
    this.#parser = new QmpParser(options.maxLineBytes)
    this.#commandDeadlineMs = options.commandDeadlineMs ?? defaultDeadlineMs
    this.#lingerMs = options.lingerMs ?? 500
    this.#greeted.promise.catch(() => undefined)
    this.#socket = createConnection({ path: socketPath })
    let connected = false
    this.#socket.on('connect', () => (connected = true))
    this.#socket.on('error', (cause) =>
      this.#finish(connected ? new CdpError('CLOSED', `The QMP connection broke: ${cause.message}`, { cause, context: { socketPath } }) : connectError(socketPath, cause)))
    this.#socket.on('close', () => {
      this.#finish(new CdpError('CLOSED', 'QEMU closed the QMP connection', { context: { socketPath } }))
      this.#closed.resolve()
    })
    this.#socket.on('data', (chunk: Buffer) => this.#receive(chunk))
  }

  /**
   * Connects, waits for the greeting (while another client is served there is none) and leaves the capabilities mode.
   * @throws CdpError NOT_FOUND nobody listens; CONFLICT the queue of the socket is full; TIMEOUT no greeting in time; ABORTED;
   *   CLOSED; QMP_PROTOCOL.
   */
  static async connect(socketPath: string, options: QmpConnectOptions = {}): Promise<QmpClient> {
    const deadlineMs = options.deadlineMs ?? defaultDeadlineMs
    const startedAtMs = performance.now()
    if (options.signal?.aborted) throw new CdpError('ABORTED', 'Connecting to QMP was given up', { cause: options.signal.reason })
    const client = new QmpClient(socketPath, options)
    const timer = setTimeout(() => client.#finish(new CdpError('TIMEOUT', `QEMU sent no greeting within ${deadlineMs} ms`, {
      hint: 'Another program holds the QMP socket, or QEMU hangs.', retry: true, context: { socketPath, deadlineMs } })), deadlineMs)
    const abort = () => client.#finish(new CdpError('ABORTED', 'Connecting to QMP was given up', { cause: options.signal?.reason }))
    options.signal?.addEventListener('abort', abort)
    try {
      client.#version = (await client.#greeted.promise).version
      clearTimeout(timer)
      await client.execute('qmp_capabilities', {}, { deadlineMs: Math.max(1, deadlineMs - (performance.now() - startedAtMs)) })
      return client
    } catch (error) {
      await client.close()
      throw error
    } finally {
      clearTimeout(timer)
      options.signal?.removeEventListener('abort', abort)
    }
  }

  /** From the greeting. */
  get version(): QmpVersion {
    return this.#version
  }

  /** The present end of the event history, for `waitForEvent({ sinceMark })`. The last 1024 events are kept. */
  get eventMark(): number {
    return this.#droppedEvents + this.#events.length
  }

  /**
   * Runs one command; several may be under way.
   * @throws CdpError QMP_COMMAND (context: command, class, desc); TIMEOUT (QEMU may still carry the command out); ABORTED; CLOSED.
   */
  execute(command: string, args: Readonly<Record<string, unknown>> = {}, options: QmpExecuteOptions = {}): Promise<unknown> {
    if (this.#end) return Promise.reject(this.#end)
    if (options.signal?.aborted) return Promise.reject(new CdpError('ABORTED', `${command} was given up`, { cause: options.signal.reason }))
    const id = `${this.#idPrefix}${this.#nextId++}`
    const deadlineMs = options.deadlineMs ?? this.#commandDeadlineMs
    const { promise, resolve, reject } = Promise.withResolvers<unknown>()
    const giveUp = (error: CdpError) => {
      const waiting = this.#waiting.get(id)
      if (!waiting) return
      this.#waiting.delete(id)
      waiting.stop()
      reject(error)
    }
    const timer = setTimeout(() => giveUp(new CdpError('TIMEOUT', `QEMU did not answer ${command} within ${deadlineMs} ms`, { context: { command, deadlineMs } })), deadlineMs)
    const abort = () => giveUp(new CdpError('ABORTED', `${command} was given up`, { cause: options.signal?.reason }))
    options.signal?.addEventListener('abort', abort)
    const stop = () => {
      clearTimeout(timer)
      options.signal?.removeEventListener('abort', abort)
    }
    this.#waiting.set(id, { resolve, reject, command, stop })
    this.#unanswered.add(id)
    this.#markAtCommand = this.eventMark
    this.#socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\n`)
    return promise
  }

  /**
   * The first event that `matches` takes, past ones since the mark included.
   * @throws CdpError TIMEOUT; ABORTED; CLOSED.
   */
  waitForEvent(matches: (event: QmpEvent) => boolean, options: QmpWaitOptions): Promise<QmpEvent> {
    const fromMark = options.sinceMark ?? this.#markAtCommand
    const past = this.#events.slice(Math.max(0, fromMark - this.#droppedEvents)).find(matches)
    if (past) return Promise.resolve(past)
    if (this.#end) return Promise.reject(this.#end)
    if (options.signal?.aborted) return Promise.reject(new CdpError('ABORTED', 'Waiting for an event was given up', { cause: options.signal.reason }))
    const { promise, resolve, reject } = Promise.withResolvers<QmpEvent>()
    const settle = (act: () => void) => {
      clearTimeout(timer)
      options.signal?.removeEventListener('abort', abort)
      this.#watching.delete(watching)
      act()
    }
    const watching: Watching = {
      check: (event) => {
        if (matches(event)) settle(() => resolve(event))
      },
      reject: (error) => settle(() => reject(error)),
    }
    const timer = setTimeout(() => watching.reject(new CdpError('TIMEOUT', `The awaited QMP event did not come within ${options.deadlineMs} ms`)), options.deadlineMs)
    const abort = () => watching.reject(new CdpError('ABORTED', 'Waiting for an event was given up', { cause: options.signal?.reason }))
    options.signal?.addEventListener('abort', abort)
    this.#watching.add(watching)
    return promise
  }

  /** Ends the connection; commands under way are rejected with CLOSED at once. Idempotent; resolves when the socket is gone. */
  async close(): Promise<void> {
    this.#finish(new CdpError('CLOSED', 'The QMP connection was closed'), this.#lingerMs)
    await this.#closed.promise
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close()
  }

  #receive(chunk: Buffer): void {
    if (this.#end && !this.#lingering) return
    try {
      this.#parser.push(chunk, (message) => this.#dispatch(message))
    } catch (error) {
      this.#finish(error instanceof CdpError ? error : new CdpError('INTERNAL', errorMessage(error), { cause: error }))
    }
  }

  #dispatch(message: QmpMessage): void {
    if (message.is === 'greeting') return this.#greeted.resolve(message)
    if (message.is === 'event') return this.#remember(message)
    if (message.id === undefined || !this.#unanswered.delete(message.id)) return
    if (this.#lingering && this.#unanswered.size === 0) return this.#destroy()
    const waiting = this.#waiting.get(message.id)
    if (!waiting) return
    this.#waiting.delete(message.id)
    waiting.stop()
    if (message.is === 'return') return waiting.resolve(message.value)
    waiting.reject(new CdpError('QMP_COMMAND', `QEMU refused ${waiting.command}: ${message.desc}`, {
      context: { command: waiting.command, class: message.errorClass, desc: message.desc } }))
  }

  #remember(event: QmpEvent): void {
    if (this.#events.length >= maxEvents) {
      this.#events.shift()
      this.#droppedEvents += 1
    }
    this.#events.push(event)
    for (const watching of [...this.#watching]) watching.check(event)
  }

  #finish(error: CdpError, lingerMs = 0): void {
    if (lingerMs === 0 || this.#unanswered.size === 0) this.#destroy()
    if (this.#end) return
    this.#end = error
    if (!this.#socket.destroyed) this.#lingering = setTimeout(() => this.#destroy(), lingerMs)
    this.#greeted.reject(error)
    for (const waiting of this.#waiting.values()) {
      waiting.stop()
      waiting.reject(error)
    }
    this.#waiting.clear()
    for (const watching of [...this.#watching]) watching.reject(error)
  }

  #destroy(): void {
    clearTimeout(this.#lingering)
    this.#lingering = undefined
    this.#socket.destroy()
  }
}
