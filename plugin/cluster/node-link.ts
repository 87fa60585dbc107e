import type { TLSSocket } from 'node:tls'
import { CdpError, errorMessage, toCdpError } from '../../core/errors/index.ts'
import type { ErrorCode } from '../../core/errors/index.ts'
import { connectSecure, nodeProtocol } from '../../core/link/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { judgeCertificate } from '../../core/pki/index.ts'
import type { TlsIdentity } from '../../core/pki/index.ts'
import type { NodeAddress } from './cluster-files.ts'
import { NodeMessageParser, checkAnswer, encodeMessage, readReply } from './wire.ts'
import type { MemberReport, NodeAnswer, NodeAsk, NodeAskName } from './wire.ts'
import type { Static } from '@sinclair/typebox'

export type NodeLinkOptions = {
  node: string
  /** Looked up before each try: a node may have moved. */
  address: () => Promise<NodeAddress | undefined>
  tls: TlsIdentity
  log: Logger
}

const CONNECT_DEADLINE_MS = 2_000
const RETRY_FIRST_MS = 250
const RETRY_MAX_MS = 4_000
const STATUS_EVERY_MS = 500
/** A report older than this says nothing any more. */
const FRESH_MS = 2_000
/** A peer that has been silent for so long is given up, and dialled again. */
const HUNG_MS = 5_000
const MAX_WAITING = 1_000

type Waiting = { resolve: (answer: unknown) => void; reject: (error: CdpError) => void; deadline: NodeJS.Timeout }
export type NodeReport = Map<string, Static<typeof MemberReport>>

/**
 * The connection to one other node, kept open and warm: a cut must not pay for a handshake. Asks for the node's status twice a second;
 * what it knows of the node is never older than `FRESH_MS`. Every request has a deadline.
 */
export class NodeLink implements AsyncDisposable {
  readonly node: string
  readonly #options: NodeLinkOptions
  readonly #abort = new AbortController()
  readonly #waiting = new Map<number, Waiting>()
  #socket: TLSSocket | undefined
  #nextId = 1
  #why = 'it is being connected to'
  #retryMs = RETRY_FIRST_MS
  #retry: NodeJS.Timeout | undefined
  #statusTimer: NodeJS.Timeout | undefined
  #statusBusy = false
  #report: NodeReport | undefined
  #reportAtMs = 0
  #heardMs = 0
  #connecting: Promise<void> = Promise.resolve()

  constructor(options: NodeLinkOptions) {
    this.node = options.node
    this.#options = options
  }

  start(): void {
    this.#statusTimer = setInterval(() => void this.#askStatus(), STATUS_EVERY_MS)
    this.#connecting = this.#connect()
  }

  /** What the node said lately, or why nothing is known. */
  report(): { known: true; vpgs: NodeReport } | { known: false; why: string } {
    const ageMs = performance.now() - this.#reportAtMs
    if (this.#report !== undefined && ageMs < FRESH_MS) return { known: true, vpgs: this.#report }
    if (this.#socket !== undefined) return { known: false, why: this.#report === undefined ? `node ${this.node} has not answered yet` : `node ${this.node} has not answered for ${Math.round(ageMs / 1000)} s` }
    return { known: false, why: `node ${this.node} cannot be reached: ${this.#why}` }
  }

  /** @throws CdpError UNREACHABLE at once if there is no connection; TIMEOUT at the deadline; what the other node answered */
  async ask<Name extends NodeAskName>(name: Name, ask: NodeAsk<Name>, deadlineMs: number): Promise<NodeAnswer<Name>> {
    const socket = this.#socket
    if (socket === undefined) throw new CdpError('UNREACHABLE', `node ${this.node} cannot be reached: ${this.#why}`, { retry: true, hint: 'Does the plugin run there, and can this node reach it?' })
    if (this.#waiting.size >= MAX_WAITING) throw new CdpError('UNREACHABLE', `node ${this.node} does not keep up with requests`, { retry: true })
    const id = this.#nextId++
    const { promise, resolve, reject } = Promise.withResolvers<unknown>()
    const deadline = setTimeout(() => {
      this.#waiting.delete(id)
      reject(new CdpError('TIMEOUT', `node ${this.node} has not answered within ${deadlineMs} ms`, { retry: true }))
    }, deadlineMs)
    this.#waiting.set(id, { resolve, reject, deadline })
    socket.write(encodeMessage({ id, name, ask }))
    return checkAnswer(name, await promise)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#abort.abort()
    clearInterval(this.#statusTimer)
    clearTimeout(this.#retry)
    this.#drop('this node stops')
    await this.#connecting
  }

  async #connect(): Promise<void> {
    const { node, address, tls, log } = this.#options
    const { signal } = this.#abort
    try {
      const to = await address()
      if (to === undefined) throw new CdpError('UNREACHABLE', 'it has not said where it listens')
      const socket = await connectSecure({ ...to, tls, alpn: nodeProtocol, deadlineMs: CONNECT_DEADLINE_MS, signal })
      const verdict = judgeCertificate(socket.getPeerX509Certificate(), { authorityPem: tls.authorityPem, usage: 'server' })
      if (signal.aborted || !verdict.ok || verdict.commonName !== node) {
        socket.on('error', () => undefined).destroy()
        throw new CdpError('UNAUTHORIZED', `another node answers at ${to.host} port ${to.port}`)
      }
      this.#use(socket)
      log.info('connected to another node', { node })
    } catch (error) {
      if (signal.aborted) return
      if (this.#why !== errorMessage(error)) log.info('another node cannot be reached', { node, why: errorMessage(error) })
      this.#why = errorMessage(error)
      this.#connectLater()
    }
  }

  #use(socket: TLSSocket): void {
    this.#socket = socket
    this.#retryMs = RETRY_FIRST_MS
    this.#heardMs = performance.now()
    const parser = new NodeMessageParser((message) => this.#onReply(message))
    socket.on('data', (chunk: Buffer) => {
      this.#heardMs = performance.now()
      try {
        parser.push(chunk)
      } catch (error) {
        this.#lose(socket, errorMessage(error))
      }
    })
    socket.on('error', (error) => this.#lose(socket, errorMessage(error)))
    socket.on('close', () => this.#lose(socket, 'it closed the connection'))
    void this.#askStatus()
  }

  #onReply(message: unknown): void {
    const reply = readReply(message)
    const waiting = this.#waiting.get(reply.id)
    if (waiting === undefined) return
    this.#waiting.delete(reply.id)
    clearTimeout(waiting.deadline)
    if ('answer' in reply) return waiting.resolve(reply.answer)
    const { code, message: text, hint } = reply.error
    waiting.reject(new CdpError(code as ErrorCode, text, hint === undefined ? {} : { hint }))
  }

  async #askStatus(): Promise<void> {
    const socket = this.#socket
    if (socket === undefined) return
    if (performance.now() - this.#heardMs > HUNG_MS) return this.#lose(socket, 'it did not answer')
    if (this.#statusBusy) return
    this.#statusBusy = true
    try {
      const { vpgs } = await this.ask('status', {}, HUNG_MS)
      this.#report = new Map(vpgs.map((vpg) => [vpg.name, vpg]))
      this.#reportAtMs = performance.now()
    } catch (error) {
      this.#options.log.debug('the status of another node is not known', { node: this.node, error: toCdpError(error) })
    } finally {
      this.#statusBusy = false
    }
  }

  #lose(socket: TLSSocket, why: string): void {
    if (this.#socket !== socket) return
    this.#options.log.info('the connection to another node is lost', { node: this.node, why })
    this.#drop(why)
    this.#connectLater()
  }

  #drop(why: string): void {
    const socket = this.#socket
    this.#socket = undefined
    this.#why = why
    this.#report = undefined
    socket?.destroy()
    for (const { reject, deadline } of this.#waiting.values()) {
      clearTimeout(deadline)
      reject(new CdpError('CLOSED', `the connection to node ${this.node} was lost: ${why}`, { retry: true }))
    }
    this.#waiting.clear()
  }

  #connectLater(): void {
    if (this.#abort.signal.aborted) return
    clearTimeout(this.#retry)
    this.#retry = setTimeout(() => {
      this.#connecting = this.#connect()
    }, this.#retryMs)
    this.#retryMs = Math.min(RETRY_MAX_MS, this.#retryMs * 2)
  }
}
