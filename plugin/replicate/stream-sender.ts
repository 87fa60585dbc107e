import type { Duplex } from 'node:stream'
import { CdpError, errorMessage, toCdpError } from '../../core/errors/index.ts'
import { MessageParser, MessageType, generationError, echoMessage, endMessage, frameMessageHeader, hashRequestMessage, helloMessage, readAck, readEcho, readHashReply, readRefuse, readStateNews, readWelcome } from '../../core/stream/index.ts'
import type { HashReply, HashRequest, Hello, StateNews, Welcome } from '../../core/stream/index.ts'
import type { SendQueue } from '../buffer/index.ts'
import type { RateLimit } from './rate-limit.ts'

export type StreamSenderOptions = {
  queue: SendQueue
  /** Holds frames back. */
  limit?: RateLimit
  /** Opens a secure connection to the agent. */
  connect: (signal: AbortSignal) => Promise<Duplex>
  onDurable: (durableSeq: number) => void
  /** A frame was given to the socket. */
  onSent?: (lengthBytes: number) => void
  onNews: (news: StateNews) => void
  onHashes?: (reply: HashReply) => void
  /** The connection is gone; `welcomed` says whether it had ever been accepted. */
  onLost: (error: CdpError) => void
  /** Silence after which a peer counts as stalled. */
  stallMs?: number
  welcomeDeadlineMs?: number
}

/** Bytes that may wait inside the socket before the sender obeys back-pressure. */
const SOCKET_HIGH_BYTES = 2 * 1024 * 1024
/** Refusals that mean more than that this stream is not wanted. */
const refusals = ['STALE_EPOCH', 'FENCED', 'GENERATION_AHEAD'] as const

/**
 * One connection of a VM's stream to the agent: says hello, sends frames from the queue, hears what is durable. Used once;
 * a reconnect is a new sender on the same queue.
 */
export class StreamSender implements AsyncDisposable {
  readonly #options: StreamSenderOptions
  readonly #abort = new AbortController()
  #socket: Duplex | undefined
  #hello: Hello | undefined
  #welcome: PromiseWithResolvers<Welcome> | undefined
  #ping: NodeJS.Timeout | undefined
  #heardMs = 0
  #epoch = 0
  #blocked = false
  #lost = false
  #failure: CdpError | undefined
  #later: NodeJS.Timeout | undefined

  constructor(options: StreamSenderOptions) {
    this.#options = options
  }

  /**
   * Connects and introduces the VM. After the answer the caller rewinds the queue and calls `pump`.
   * @throws CdpError UNREACHABLE, STREAM_REFUSED, STALE_EPOCH, FENCED and GENERATION_AHEAD (context.generation: the agent's), STREAM_PROTOCOL, TIMEOUT
   */
  async open(hello: Hello): Promise<Welcome> {
    const signal = this.#abort.signal
    const introduction = helloMessage(hello)
    this.#hello = hello
    const socket = await this.#options.connect(signal)
    if (signal.aborted) {
      socket.destroy()
      throw new CdpError('ABORTED', 'the stream was given up')
    }
    this.#socket = socket
    this.#heardMs = performance.now()
    const welcome = Promise.withResolvers<Welcome>()
    this.#welcome = welcome
    const parser = new MessageParser((type, body) => this.#onMessage(type, body))
    socket.on('data', (chunk: Buffer) => {
      this.#heardMs = performance.now()
      try {
        parser.push(chunk)
      } catch (error) {
        this.#fail(toCdpError(error, 'STREAM_PROTOCOL'))
      }
    })
    socket.on('error', (error) => this.#fail(new CdpError('CLOSED', `stream to the agent broke: ${errorMessage(error)}`, { cause: error, retry: true })))
    socket.on('close', () => this.#fail(new CdpError('CLOSED', 'the agent closed the stream', { retry: true })))
    socket.on('drain', () => {
      this.#blocked = false
      this.pump()
    })
    const stallMs = this.#options.stallMs ?? 15_000
    this.#ping = setInterval(() => {
      const silentMs = performance.now() - this.#heardMs
      if (silentMs > stallMs) this.#fail(new CdpError('TIMEOUT', `the agent has been silent for ${Math.round(silentMs / 1000)} s`, { retry: true }))
      else if (!this.#blocked) socket.write(echoMessage(MessageType.ping, Math.floor(performance.now())))
    }, stallMs / 4)
    const deadline = setTimeout(() => this.#fail(new CdpError('TIMEOUT', 'the agent did not answer the hello', { retry: true })), this.#options.welcomeDeadlineMs ?? 10_000)
    socket.write(introduction)
    try {
      const answer = await welcome.promise
      // What came with the welcome, in the same turn, may have been the end already.
      if (this.#failure !== undefined) throw this.#failure
      this.#epoch = answer.epoch
      return answer
    } finally {
      clearTimeout(deadline)
    }
  }

  /** Sends what the queue has, as far as the limit and the socket take it. */
  pump(): void {
    const socket = this.#socket
    if (socket === undefined || this.#lost || this.#epoch === 0) return
    const { queue, limit, onSent } = this.#options
    while (!this.#blocked) {
      const waitMs = limit?.waitMs() ?? 0
      if (waitMs > 0) {
        this.#later ??= setTimeout(() => {
          this.#later = undefined
          this.pump()
        }, waitMs)
        return
      }
      const frame = queue.next()
      if (frame === undefined) return
      limit?.spend(frame.lengthBytes)
      onSent?.(frame.lengthBytes)
      socket.cork()
      socket.write(frameMessageHeader(frame.lengthBytes))
      socket.write(frame.head)
      if (frame.payload.length > 0) socket.write(frame.payload)
      socket.uncork()
      this.#blocked = socket.writableLength > SOCKET_HIGH_BYTES
    }
  }

  /** Asks for hashes; few and small, so it does not wait for frames. Nothing comes of it after the connection was lost. */
  askHashes(request: HashRequest): void {
    if (!this.#lost && this.#epoch !== 0) this.#socket?.write(hashRequestMessage(request))
  }

  /** Says that nothing will follow, and closes once that is sent. */
  end(): void {
    const socket = this.#socket
    if (socket === undefined || this.#lost) return
    this.#lost = true
    clearInterval(this.#ping)
    clearTimeout(this.#later)
    socket.end(endMessage())
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#lost = true
    this.#abort.abort()
    clearInterval(this.#ping)
    clearTimeout(this.#later)
    this.#welcome?.reject(new CdpError('ABORTED', 'the stream was given up'))
    this.#welcome = undefined
    this.#socket?.destroy()
  }

  #onMessage(type: MessageType, body: Buffer): void {
    switch (type) {
      case MessageType.welcome:
        return this.#onWelcome(readWelcome(body))
      case MessageType.refuse: {
        const { code, message, hint, generation } = readRefuse(body)
        return this.#fail(new CdpError(refusals.find((known) => known === code) ?? 'STREAM_REFUSED', message, { ...(hint === undefined ? {} : { hint }), ...(generation === undefined ? {} : { context: { generation } }) }))
      }
      case MessageType.ack: {
        const ack = readAck(body)
        if (ack.epoch === this.#epoch) this.#options.onDurable(ack.durableSeq)
        return
      }
      case MessageType.ping:
        this.#socket?.write(echoMessage(MessageType.pong, readEcho(body)))
        return
      case MessageType.state:
        return this.#options.onNews(readStateNews(body))
      case MessageType.hashReply:
        return this.#options.onHashes?.(readHashReply(body))
      case MessageType.pong:
        return
      case MessageType.hashRequest:
      case MessageType.hello:
      case MessageType.frame:
      case MessageType.end:
        throw new CdpError('STREAM_PROTOCOL', `the agent sent a message of type ${type}`)
    }
  }

  /** An agent that holds another generation does not take what we send into the group's history. */
  #onWelcome(welcome: Welcome): void {
    const hello = this.#hello
    const disowned = hello && generationError(hello.vpg, hello.generation, welcome.generation)
    if (disowned !== undefined) return this.#fail(disowned)
    this.#welcome?.resolve(welcome)
    this.#welcome = undefined
  }

  #fail(error: CdpError): void {
    if (this.#lost) return
    this.#lost = true
    this.#failure = error
    clearInterval(this.#ping)
    clearTimeout(this.#later)
    const welcome = this.#welcome
    this.#welcome = undefined
    this.#socket?.destroy()
    if (welcome !== undefined) welcome.reject(error)
    else this.#options.onLost(error)
  }
}
