import type { Duplex } from 'node:stream'
import { CdpError, toCdpError } from '../../core/errors/index.ts'
import { HASH_EXTENT_BYTES } from '../../core/stream/index.ts'
import type { ExtentHashes, HashRequest, Hello, StateNews, Welcome } from '../../core/stream/index.ts'
import type { SendQueue } from '../buffer/index.ts'
import { HashQuestions } from './hash-questions.ts'
import type { RateLimit } from './rate-limit.ts'
import { StreamSender } from './stream-sender.ts'

const RECONNECT_FIRST_MS = 250
const RECONNECT_MAX_MS = 10_000

const isDisowned = (error: unknown): error is CdpError => error instanceof CdpError && (error.code === 'FENCED' || error.code === 'GENERATION_AHEAD')

export type StreamLinkOptions = {
  queue: SendQueue
  /** See StreamSenderOptions. */
  limit?: RateLimit
  connect: (signal: AbortSignal) => Promise<Duplex>
  /** Introduces the VM; epoch 0 asks for a new attach. */
  hello: (epoch: number, reason: string) => Hello
  random: () => number
  onUp: () => void
  /** The connection is lost; the link connects again by itself. */
  onDown: (why: string) => void
  /** This attach has no future: a newer one owns the journal, the agent refuses, or it lost what it had acknowledged. */
  onOver: (why: string) => void
  /** The agent has the group in another generation than we (FENCED, GENERATION_AHEAD). */
  onDisowned?: (error: CdpError) => void
  onDurable: (durableSeq: number) => void
  onNews: (news: StateNews) => void
}

/**
 * A VM's stream over as many connections as it takes: a new attach is opened once, then each lost connection is followed by another one that
 * goes on with the same epoch, after a pause that doubles and is drawn at random, so that many VMs do not come back at once.
 */
export class StreamLink implements AsyncDisposable {
  readonly #options: StreamLinkOptions
  readonly #questions = new HashQuestions((request) => {
    if (!this.#up || this.#sender === undefined) throw new CdpError('CLOSED', 'the link is down', { retry: true })
    this.#sender.askHashes(request)
  })
  #sender: StreamSender | undefined
  #opening: StreamSender | undefined
  #up = false
  #epoch = 0
  #durableSeq = 0
  #sentBytes = 0
  #reconnect: NodeJS.Timeout | undefined
  #reconnectMs = RECONNECT_FIRST_MS
  #disposed = false
  #over = false
  /** The agent said that it answers questions for hashes; one that did not takes them for a broken stream. */
  #offersHashes = false

  constructor(options: StreamLinkOptions) {
    this.#options = options
  }

  get up(): boolean {
    return this.#up
  }

  /** The attach has a future: it is up, or comes back. */
  get goesOn(): boolean {
    return this.#epoch > 0 && !this.#over
  }

  /** Bytes of frames sent, over all connections; what was sent again counts again. */
  get sentBytes(): number {
    return this.#sentBytes
  }

  /** Everything up to here is durable at the agent. */
  get durableSeq(): number {
    return this.#durableSeq
  }

  /**
   * Begins a new attach. `begin` is called with the agent's answer before anything is sent.
   * @returns true if the agent holds less than it had acknowledged before
   * @throws CdpError as StreamSender.open
   */
  async open(reason: string, begin: (welcome: Welcome) => void): Promise<boolean> {
    await this.close()
    const sender = this.#newSender()
    this.#opening = sender
    const welcome = await sender.open(this.#options.hello(0, reason)).catch((error: unknown) => {
      if (isDisowned(error)) this.#options.onDisowned?.(error)
      throw error
    }).finally(() => {
      if (this.#opening === sender) this.#opening = undefined
    })
    const agentLostData = welcome.durableSeq < this.#durableSeq
    this.#epoch = welcome.epoch
    this.#over = false
    this.#durableSeq = welcome.durableSeq
    begin(welcome)
    this.#use(sender, welcome)
    return agentLostData
  }

  /** Ends an `open` that waits for the agent: it rejects with ABORTED. */
  cancelOpen(): void {
    void this.#opening?.[Symbol.asyncDispose]()
  }

  /** Sends what the queue has. */
  pump(): void {
    if (this.#up) this.#sender?.pump()
  }

  /** What the agent holds of a range of extents. @throws as HashQuestions.ask; CLOSED at once while the link is down */
  askHashes(question: Omit<HashRequest, 'requestId'>): Promise<ExtentHashes> {
    return this.#questions.ask(question)
  }

  /** Nothing more will be asked for now: the agent need not keep what it answered from. */
  restHashes(): void {
    if (this.#up && this.#offersHashes) this.#sender?.askHashes({ requestId: 0, disk: 0, asOfSeq: 0, offsetBytes: 0, extentBytes: HASH_EXTENT_BYTES, extentCount: 0 })
  }

  /** Says that nothing will follow; it does not come back until `open`. */
  end(): void {
    this.#up = false
    this.#epoch = 0
    this.#questions.drop('the stream has ended')
    this.#sender?.end()
  }

  /** Ends the connection and does not come back until `open`. */
  async close(): Promise<void> {
    clearTimeout(this.#reconnect)
    this.#epoch = 0
    const sender = this.#sender
    this.#sender = undefined
    this.#up = false
    this.#questions.drop('the stream was closed')
    await sender?.[Symbol.asyncDispose]()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true
    await this.close()
  }

  #newSender(): StreamSender {
    const sender: StreamSender = new StreamSender({
      queue: this.#options.queue,
      ...(this.#options.limit === undefined ? {} : { limit: this.#options.limit }),
      connect: this.#options.connect,
      onDurable: (durableSeq) => {
        if (this.#sender === sender) this.#durable(durableSeq)
      },
      onNews: this.#options.onNews,
      onSent: (lengthBytes) => (this.#sentBytes += lengthBytes),
      onHashes: (reply) => {
        if (this.#sender === sender) this.#questions.take(reply)
      },
      onLost: (error) => {
        if (this.#sender === sender) this.#lost(error)
      },
    })
    return sender
  }

  #use(sender: StreamSender, { durableSeq, hashes }: Welcome): void {
    this.#sender = sender
    this.#up = true
    this.#offersHashes = hashes === true
    this.#reconnectMs = RECONNECT_FIRST_MS
    this.#options.queue.rewind(durableSeq)
    this.#durable(durableSeq)
    this.#options.onUp()
    sender.pump()
  }

  #durable(durableSeq: number): void {
    if (durableSeq > this.#durableSeq) this.#durableSeq = durableSeq
    this.#options.queue.release(durableSeq)
    this.#options.onDurable(durableSeq)
  }

  #lost(error: CdpError): void {
    const wasUp = this.#up
    this.#sender = undefined
    this.#up = false
    this.#questions.drop(error.message)
    if (wasUp) this.#options.onDown(error.message)
    if (isDisowned(error)) this.#options.onDisowned?.(error)
    if (error.code === 'STALE_EPOCH' || error.code === 'STREAM_REFUSED' || isDisowned(error)) this.#giveUp(error.message)
    else this.#scheduleReconnect()
  }

  #giveUp(why: string): void {
    this.#over = true
    this.#options.onOver(why)
  }

  #scheduleReconnect(): void {
    if (this.#disposed || this.#epoch === 0) return
    const delayMs = this.#reconnectMs * (0.5 + this.#options.random())
    this.#reconnectMs = Math.min(RECONNECT_MAX_MS, this.#reconnectMs * 2)
    clearTimeout(this.#reconnect)
    this.#reconnect = setTimeout(() => void this.#resume(), delayMs)
  }

  async #resume(): Promise<void> {
    const sender = this.#newSender()
    this.#sender = sender
    try {
      const welcome = await sender.open(this.#options.hello(this.#epoch, 'reconnect'))
      if (this.#sender !== sender) return
      if (welcome.durableSeq < this.#durableSeq) {
        await sender[Symbol.asyncDispose]()
        throw new CdpError('STALE_EPOCH', 'the agent has lost data that it had acknowledged')
      }
      this.#use(sender, welcome)
    } catch (error) {
      if (this.#sender === sender) this.#lost(toCdpError(error, 'CLOSED'))
    }
  }
}
