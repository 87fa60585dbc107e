import type { Duplex } from 'node:stream'
import { CdpError, toCdpError } from '../../core/errors/index.ts'
import type { Hello, StateNews, Welcome } from '../../core/stream/index.ts'
import type { FrameQueue } from '../buffer/index.ts'
import { StreamSender } from './stream-sender.ts'

const RECONNECT_FIRST_MS = 250
const RECONNECT_MAX_MS = 10_000

export type StreamLinkOptions = {
  queue: FrameQueue
  connect: (signal: AbortSignal) => Promise<Duplex>
  /** Introduces the VM; epoch 0 asks for a new attach. */
  hello: (epoch: number, reason: string) => Hello
  random: () => number
  onUp: () => void
  /** The connection is lost; the link connects again by itself. */
  onDown: (why: string) => void
  /** This attach has no future: a newer one owns the journal, the agent refuses, or it lost what it had acknowledged. */
  onOver: (why: string) => void
  onDurable: (durableSeq: number) => void
  onNews: (news: StateNews) => void
}

/**
 * A VM's stream over as many connections as it takes: a new attach is opened once, then each lost connection is followed by another one that
 * goes on with the same epoch, after a pause that doubles and is drawn at random, so that many VMs do not come back at once.
 */
export class StreamLink implements AsyncDisposable {
  readonly #options: StreamLinkOptions
  #sender: StreamSender | undefined
  #up = false
  #epoch = 0
  #durableSeq = 0
  #reconnect: NodeJS.Timeout | undefined
  #reconnectMs = RECONNECT_FIRST_MS
  #disposed = false

  constructor(options: StreamLinkOptions) {
    this.#options = options
  }

  get up(): boolean {
    return this.#up
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
    const welcome = await sender.open(this.#options.hello(0, reason))
    const agentLostData = welcome.durableSeq < this.#durableSeq
    this.#epoch = welcome.epoch
    this.#durableSeq = welcome.durableSeq
    begin(welcome)
    this.#use(sender, welcome)
    return agentLostData
  }

  /** Sends what the queue has. */
  pump(): void {
    if (this.#up) this.#sender?.pump()
  }

  /** Says that nothing will follow. */
  end(): void {
    this.#up = false
    this.#sender?.end()
  }

  /** Ends the connection and does not come back until `open`. */
  async close(): Promise<void> {
    clearTimeout(this.#reconnect)
    this.#epoch = 0
    const sender = this.#sender
    this.#sender = undefined
    this.#up = false
    await sender?.[Symbol.asyncDispose]()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#disposed = true
    await this.close()
  }

  #newSender(): StreamSender {
    const sender: StreamSender = new StreamSender({
      queue: this.#options.queue,
      connect: this.#options.connect,
      onDurable: (durableSeq) => {
        if (this.#sender === sender) this.#durable(durableSeq)
      },
      onNews: this.#options.onNews,
      onLost: (error) => {
        if (this.#sender === sender) this.#lost(error)
      },
    })
    return sender
  }

  #use(sender: StreamSender, { durableSeq }: Welcome): void {
    this.#sender = sender
    this.#up = true
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
    if (wasUp) this.#options.onDown(error.message)
    if (error.code === 'STALE_EPOCH' || error.code === 'STREAM_REFUSED') this.#options.onOver(error.message)
    else this.#scheduleReconnect()
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
