import type { Duplex } from 'node:stream'
import { CdpError, errorMessage, toCdpError } from '../../core/errors/index.ts'
import { MessageParser, MessageType, echoMessage, endMessage, frameMessageHeader, helloMessage, readAck, readEcho, readRefuse, readStateNews, readWelcome } from '../../core/stream/index.ts'
import type { Hello, StateNews, Welcome } from '../../core/stream/index.ts'
import type { FrameQueue } from '../buffer/index.ts'

export type StreamSenderOptions = {
  queue: FrameQueue
  /** Opens a secure connection to the agent. */
  connect: (signal: AbortSignal) => Promise<Duplex>
  onDurable: (durableSeq: number) => void
  onNews: (news: StateNews) => void
  /** The connection is gone; `welcomed` says whether it had ever been accepted. */
  onLost: (error: CdpError) => void
  /** Silence after which a peer counts as stalled. */
  stallMs?: number
  welcomeDeadlineMs?: number
}

/** Bytes that may wait inside the socket before the sender obeys back-pressure. */
const SOCKET_HIGH_BYTES = 2 * 1024 * 1024

/**
 * One connection of a VM's stream to the agent: says hello, sends frames from the queue, hears what is durable. Used once;
 * a reconnect is a new sender on the same queue.
 */
export class StreamSender implements AsyncDisposable {
  readonly #options: StreamSenderOptions
  readonly #abort = new AbortController()
  #socket: Duplex | undefined
  #welcome: PromiseWithResolvers<Welcome> | undefined
  #ping: NodeJS.Timeout | undefined
  #heardMs = 0
  #epoch = 0
  #blocked = false
  #lost = false
  #failure: CdpError | undefined

  constructor(options: StreamSenderOptions) {
    this.#options = options
  }

  /**
   * Connects and introduces the VM. After the answer the caller rewinds the queue and calls `pump`.
   * @throws CdpError UNREACHABLE, STREAM_REFUSED, STALE_EPOCH, STREAM_PROTOCOL, TIMEOUT
   */
  async open(hello: Hello): Promise<Welcome> {
    const signal = this.#abort.signal
    const introduction = helloMessage(hello)
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

  /** Sends what the queue has, as far as the socket takes it. */
  pump(): void {
    const socket = this.#socket
    if (socket === undefined || this.#lost || this.#epoch === 0) return
    while (!this.#blocked) {
      const frame = this.#options.queue.next()
      if (frame === undefined) return
      socket.cork()
      socket.write(frameMessageHeader(frame.lengthBytes))
      socket.write(frame.head)
      if (frame.payload.length > 0) socket.write(frame.payload)
      socket.uncork()
      this.#blocked = socket.writableLength > SOCKET_HIGH_BYTES
    }
  }

  /** Says that nothing will follow, and closes once that is sent. */
  end(): void {
    const socket = this.#socket
    if (socket === undefined || this.#lost) return
    this.#lost = true
    clearInterval(this.#ping)
    socket.end(endMessage())
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#lost = true
    this.#abort.abort()
    clearInterval(this.#ping)
    this.#welcome?.reject(new CdpError('ABORTED', 'the stream was given up'))
    this.#welcome = undefined
    this.#socket?.destroy()
  }

  #onMessage(type: MessageType, body: Buffer): void {
    switch (type) {
      case MessageType.welcome:
        this.#welcome?.resolve(readWelcome(body))
        this.#welcome = undefined
        return
      case MessageType.refuse: {
        const { code, message, hint } = readRefuse(body)
        return this.#fail(new CdpError(code === 'STALE_EPOCH' ? 'STALE_EPOCH' : 'STREAM_REFUSED', message, hint === undefined ? {} : { hint }))
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
      case MessageType.pong:
        return
      case MessageType.hello:
      case MessageType.frame:
      case MessageType.end:
        throw new CdpError('STREAM_PROTOCOL', `the agent sent a message of type ${type}`)
    }
  }

  #fail(error: CdpError): void {
    if (this.#lost) return
    this.#lost = true
    this.#failure = error
    clearInterval(this.#ping)
    const welcome = this.#welcome
    this.#welcome = undefined
    this.#socket?.destroy()
    if (welcome !== undefined) welcome.reject(error)
    else this.#options.onLost(error)
  }
}
