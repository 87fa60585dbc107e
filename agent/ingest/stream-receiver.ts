import type { Duplex } from 'node:stream'
import { CdpError, toCdpError } from '../../core/errors/index.ts'
import { readInto } from '../../core/link/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { MessageParser, MessageType, ackMessage, echoMessage, hashReplyMessage, readEcho, readHashRequest, readHello, refuseMessage, stateMessage, welcomeMessage } from '../../core/stream/index.ts'
import type { HashRequest, Hello, StateNews } from '../../core/stream/index.ts'
import { mirrorHasData } from '../mirror/index.ts'
import type { HashDesk, HashLane } from '../hashes/index.ts'
import type { VmStore } from '../journal/index.ts'

export type StreamReceiverOptions = {
  socket: Duplex
  log: Logger
  /** Gives the store of the VM that says hello, and sees to it that older streams of it end. @throws CdpError: refused with its message */
  admit: (hello: Hello, receiver: StreamReceiver) => Promise<{ store: VmStore; generation: number }>
  /** The stream begins; what is told here comes right after the welcome. */
  onWelcomed?: (receiver: StreamReceiver) => void
  onClosed: (receiver: StreamReceiver, why: string) => void
  /** Who makes hashes for delta syncs; without one the protected site copies in full. */
  hashes?: HashDesk
  /** Where bodies of messages come from; who gets a frame gives them back. */
  allocate?: (lengthBytes: number) => Buffer
  helloDeadlineMs?: number
  stallMs?: number
}

/** What a store may have waiting before the stream is not read on. */
const PAUSE_BYTES = 32 * 1024 * 1024
/** What TLS gives at once. */
const SCRATCH_BYTES = 16 * 1024
const RESUME_BYTES = 16 * 1024 * 1024

/** The agent's end of one stream: hello, frames into the VM's store, an acknowledgement for what is durable. */
export class StreamReceiver implements Disposable {
  readonly #options: StreamReceiverOptions
  readonly #socket: Duplex
  readonly #parser: MessageParser
  #hello: Hello | undefined
  #store: VmStore | undefined
  #lane: HashLane | undefined
  #epoch = 0
  #closed = false
  #paused = false
  #heardMs = performance.now()
  #watch: NodeJS.Timeout
  #deadline: NodeJS.Timeout | undefined
  readonly #onDurable = (durableSeq: number, epoch: number): void => {
    if (epoch === this.#epoch) this.#acknowledge(durableSeq)
  }
  readonly #onStopped = (error: CdpError): void => this.refuse(error)

  constructor(options: StreamReceiverOptions) {
    this.#options = options
    this.#socket = options.socket
    this.#parser = new MessageParser((type, body) => this.#onMessage(type, body), options.allocate)
    const stallMs = options.stallMs ?? 20_000
    this.#watch = setInterval(() => {
      if (!this.#paused && performance.now() - this.#heardMs > stallMs) this.close('the protected site has been silent')
      // On a slow line the answers to the other side's pings stand behind its frames: it hears from us without having asked.
      else if (this.#epoch > 0 && !this.#closed) this.#socket.write(echoMessage(MessageType.ping, Math.floor(performance.now())))
    }, stallMs / 4)
    this.#deadline = setTimeout(() => this.close('no hello came'), options.helloDeadlineMs ?? 10_000)
    this.#socket.on('error', (error) => this.close(error.message))
    this.#socket.on('close', () => this.close('the protected site closed the stream'))
    this.#read()
  }

  get closed(): boolean {
    return this.#closed
  }

  get hello(): Hello | undefined {
    return this.#hello
  }

  get epoch(): number {
    return this.#epoch
  }

  /** Tells the protected site something it shows to its operator. */
  tell(news: StateNews): void {
    if (!this.#closed && this.#epoch > 0) this.#socket.write(stateMessage(news))
  }

  /** Ends the stream with a reason that the other side shows. */
  refuse(error: CdpError): void {
    if (this.#closed) return
    const { generation } = error.context
    this.#socket.write(refuseMessage({
      code: error.code, message: error.message, ...(error.hint === undefined ? {} : { hint: error.hint }), ...(typeof generation === 'number' ? { generation } : {}),
    }))
    this.#socket.end()
    this.#options.log.warn('stream refused', { vm: this.#hello?.vm, code: error.code, why: error.message })
    this.#finish(error.message)
    // A peer that does not close its side is not waited for.
    setTimeout(() => this.#socket.destroy(), 1000).unref()
  }

  close(why: string): void {
    if (this.#closed) return
    this.#socket.destroy()
    this.#finish(why)
  }

  [Symbol.dispose](): void {
    this.close('the agent stops')
  }

  /** Frames are read from the socket to where they stay until they are on the disk. */
  #read(): void {
    const parser = this.#parser
    const scratch = Buffer.allocUnsafeSlow(SCRATCH_BYTES)
    let place: Buffer | undefined
    readInto(this.#socket, {
      nextBuffer: () => (place = parser.placeForBody()) ?? scratch,
      onRead: (lengthBytes) => {
        this.#heardMs = performance.now()
        try {
          if (place === undefined) parser.push(scratch, lengthBytes)
          else parser.advance(lengthBytes)
        } catch (error) {
          this.refuse(toCdpError(error, 'STREAM_PROTOCOL'))
        }
      },
    })
  }

  #finish(why: string): void {
    this.#closed = true
    clearInterval(this.#watch)
    clearTimeout(this.#deadline)
    // A newer stream may have put its own there.
    if (this.#store?.onDurable === this.#onDurable) this.#store.onDurable = undefined
    if (this.#store?.onStopped === this.#onStopped) this.#store.onStopped = undefined
    this.#lane?.[Symbol.dispose]()
    this.#options.onClosed(this, why)
  }

  /** A newer stream of the same VM takes the store over. */
  supersede(): void {
    if (this.#closed) return
    this.refuse(new CdpError('STALE_EPOCH', 'a newer attach of this VM owns the journal'))
  }

  #onMessage(type: MessageType, body: Buffer): void {
    if (this.#closed) return
    switch (type) {
      case MessageType.hello:
        if (this.#hello !== undefined) throw new CdpError('STREAM_PROTOCOL', 'a second hello')
        this.#hello = readHello(body)
        clearTimeout(this.#deadline)
        void this.#welcome(this.#hello)
        return
      case MessageType.frame: {
        const store = this.#store
        if (store === undefined || this.#epoch === 0) throw new CdpError('STREAM_PROTOCOL', 'a frame before the welcome')
        store.accept(body)
        if (store.queuedBytes > PAUSE_BYTES && !this.#paused) {
          this.#paused = true
          this.#socket.pause()
        }
        return
      }
      case MessageType.ping:
        this.#socket.write(echoMessage(MessageType.pong, readEcho(body)))
        return
      case MessageType.hashRequest:
        if (this.#lane === undefined) throw new CdpError('STREAM_PROTOCOL', 'a hash request that was not offered')
        void this.#hash(this.#lane, readHashRequest(body))
        return
      case MessageType.end:
        return
      case MessageType.pong:
        return
      case MessageType.hashReply:
      case MessageType.welcome:
      case MessageType.refuse:
      case MessageType.ack:
      case MessageType.state:
        throw new CdpError('STREAM_PROTOCOL', `the protected site sent a message of type ${type}`)
    }
  }

  async #welcome(hello: Hello): Promise<void> {
    try {
      const { store, generation } = await this.#options.admit(hello, this)
      if (this.#closed) return
      const answer = hello.epoch === 0 ? await store.beginEpoch(hello.disks, { joins: hello.joins === true }) : await store.resumeEpoch(hello.epoch)
      const hasData = this.#options.hashes !== undefined && (await mirrorHasData(store.directory, answer.disks))
      if (this.#closed) return
      this.#store = store
      this.#lane = this.#options.hashes?.open({
        vmDirectory: store.directory, reason: `a sync of VM ${hello.vm} compares`, durableSeq: () => store.durableSeq, baseComplete: () => store.baseComplete,
      })
      this.#epoch = answer.epoch
      store.onDurable = this.#onDurable
      store.onStopped = this.#onStopped
      this.#socket.write(welcomeMessage({ ...answer, generation, ...(this.#lane === undefined ? {} : { hashes: true }), ...(hasData ? { mirrorHasData: true } : {}) }))
      this.#options.onWelcomed?.(this)
      this.#options.log.info('stream begins', { vm: hello.vm, vpg: hello.vpg, epoch: answer.epoch, durableSeq: answer.durableSeq, why: hello.reason })
    } catch (error) {
      this.refuse(toCdpError(error, 'INTERNAL'))
    }
  }

  /** What the other side asks for too much of ends the stream; everything else that fails is its answer. */
  async #hash(lane: HashLane, request: HashRequest): Promise<void> {
    if (request.extentCount === 0) return lane.rest()
    try {
      const found = await lane.ask(request)
      if (!this.#closed) this.#socket.write(hashReplyMessage({ requestId: request.requestId, ...found }))
    } catch (error) {
      const { code, message } = toCdpError(error, 'IO')
      if (this.#closed) return
      if (error instanceof CdpError && code === 'STREAM_PROTOCOL') this.refuse(error)
      else this.#socket.write(hashReplyMessage({ requestId: request.requestId, error: { code, message } }))
    }
  }

  #acknowledge(durableSeq: number): void {
    if (this.#closed) return
    this.#socket.write(ackMessage({ epoch: this.#epoch, durableSeq }))
    if (this.#paused && (this.#store?.queuedBytes ?? 0) < RESUME_BYTES) {
      this.#paused = false
      this.#heardMs = performance.now()
      this.#socket.resume()
    }
  }
}
