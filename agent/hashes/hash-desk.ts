import { Worker } from 'node:worker_threads'
import { CdpError } from '../../core/errors/index.ts'
import { MAX_HASH_REQUESTS } from '../../core/stream/index.ts'
import type { ExtentHashes, HashRequest } from '../../core/stream/index.ts'
import type { Pin, PinRegistry } from '../recovery/index.ts'
import type { HashJob, HashJobAnswer } from './hash-worker.ts'

export type HashDeskOptions = {
  /** Told what is read, so that promotion stays below. */
  pins: PinRegistry
  /** A stream that asks nothing for so long holds no pin any more. */
  idleMs?: number
}

/** A sequence that a lane asks about: pinned, and a reader of the worker by its key. */
type Place = { seq: number; ofBase: boolean; key: string; pin: Pin; users: number }
type Waiting = { job: HashJob; settle: (answer: HashJobAnswer | CdpError) => void }

/** Who asks: one stream of a VM. `durableSeq` is asked anew with each request. */
export type HashAsker = { vmDirectory: string; reason: string; durableSeq: () => number; baseComplete: () => boolean }

/**
 * Hashes for delta syncs, made in one worker thread for all VMs of the agent. Streams take turns, request by request, so that none waits for
 * another's whole disk. The worker starts with the first request.
 */
export class HashDesk implements AsyncDisposable {
  readonly #options: HashDeskOptions
  readonly #lanes = new Map<HashLane, Waiting[]>()
  #worker: Worker | undefined
  #current: Waiting | undefined
  #nextKey = 1
  #closed = false

  constructor(options: HashDeskOptions) {
    this.#options = options
  }

  get waitingCount(): number {
    let count = this.#current === undefined ? 0 : 1
    for (const waiting of this.#lanes.values()) count += waiting.length
    return count
  }

  /** A lane for one stream; dispose it with the stream. */
  open(asker: HashAsker): HashLane {
    return new HashLane(this, asker, this.#options.pins, this.#options.idleMs ?? 60_000)
  }

  /** A name for a reader of the worker. */
  newKey(): string {
    return String(this.#nextKey++)
  }

  /** For lanes: does one job in its turn. */
  run(lane: HashLane, job: HashJob): Promise<HashJobAnswer> {
    if (this.#closed) return Promise.reject(new CdpError('CLOSED', 'the agent stops'))
    return new Promise((resolve, reject) => {
      const settle = (answer: HashJobAnswer | CdpError): void => (answer instanceof CdpError ? reject(answer) : resolve(answer))
      const waiting = this.#lanes.get(lane) ?? []
      waiting.push({ job, settle })
      this.#lanes.set(lane, waiting)
      this.#next()
    })
  }

  /** For lanes: what has not begun is not done. */
  drop(lane: HashLane): void {
    const waiting = this.#lanes.get(lane)
    this.#lanes.delete(lane)
    for (const { settle } of waiting ?? []) settle(new CdpError('CLOSED', 'the stream has ended'))
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    for (const lane of [...this.#lanes.keys()]) this.drop(lane)
    const worker = this.#worker
    this.#worker = undefined
    this.#current?.settle(new CdpError('CLOSED', 'the agent stops'))
    this.#current = undefined
    await worker?.terminate()
  }

  #next(): void {
    if (this.#current !== undefined) return
    for (const [lane, waiting] of this.#lanes) {
      this.#current = waiting.shift()
      // The lane goes to the end of the line.
      this.#lanes.delete(lane)
      if (waiting.length > 0) this.#lanes.set(lane, waiting)
      if (this.#current !== undefined) break
    }
    if (this.#current === undefined) return
    this.#worker ??= this.#start()
    this.#worker.postMessage(this.#current.job)
  }

  #start(): Worker {
    const worker = new Worker(new URL(import.meta.url.endsWith('.ts') ? './hash-worker.ts' : './hash-worker.js', import.meta.url), { name: 'hashes' })
    worker.unref()
    const done = (answer: HashJobAnswer | CdpError): void => {
      const current = this.#current
      this.#current = undefined
      current?.settle(answer)
      this.#next()
    }
    worker.on('message', done)
    const gone = (why: string): void => {
      if (this.#worker !== worker) return
      this.#worker = undefined
      done(new CdpError('IO', why, { retry: true }))
    }
    worker.on('error', (error) => gone(`the hash worker failed: ${String(error)}`))
    worker.on('exit', (code) => gone(`the hash worker ended with code ${code}`))
    return worker
  }
}

/** The readers and pins of one stream, and its requests in order. */
export class HashLane implements Disposable {
  readonly #desk: HashDesk
  readonly #asker: HashAsker
  readonly #pins: PinRegistry
  readonly #idleMs: number
  #open: Place[] = []
  #waiting = 0
  #idle: NodeJS.Timeout | undefined
  #closed = false

  constructor(desk: HashDesk, asker: HashAsker, pins: PinRegistry, idleMs: number) {
    this.#desk = desk
    this.#asker = asker
    this.#pins = pins
    this.#idleMs = idleMs
  }

  /**
   * @throws CdpError NOT_FOUND if `asOfSeq` is not in the history (any more, or yet), BAD_INPUT for extents outside the disk, JOURNAL_DAMAGED if not even the index can be read, IO,
   * CLOSED; STREAM_PROTOCOL for more requests than may wait, which ends the stream
   */
  async ask(request: HashRequest): Promise<ExtentHashes> {
    if (this.#waiting >= MAX_HASH_REQUESTS) throw new CdpError('STREAM_PROTOCOL', 'more hash requests than may wait')
    const { vmDirectory } = this.#asker
    const baseComplete = this.#asker.baseComplete()
    if (baseComplete && request.asOfSeq > this.#asker.durableSeq()) throw new CdpError('NOT_FOUND', `sequence ${request.asOfSeq} is not durable here yet`)
    const seq = baseComplete ? request.asOfSeq : 0
    this.#waiting++
    clearTimeout(this.#idle)
    const place = this.#place(seq, !baseComplete)
    place.users++
    try {
      const { disk, offsetBytes, extentBytes, extentCount } = request
      const answer = await this.#desk.run(this, { is: 'hash', vmDirectory, key: place.key, seq, disk, offsetBytes, extentBytes, extentCount })
      if ('error' in answer) throw new CdpError(answer.error.code, answer.error.message)
      if ('closed' in answer) throw new CdpError('INTERNAL', 'the hash worker answered something else')
      const { marks, hashes } = answer
      // A Buffer that was sent between threads arrives as its base class.
      return { marks, hashes: Buffer.from(hashes.buffer, hashes.byteOffset, hashes.byteLength) }
    } finally {
      place.users--
      this.#waiting--
      this.#tidy()
    }
  }

  /** Nothing more will be asked for now: no pin is held and no reader kept. */
  rest(): void {
    clearTimeout(this.#idle)
    for (const place of this.#open) this.#close(place)
    this.#open = []
  }

  [Symbol.dispose](): void {
    this.#closed = true
    this.#desk.drop(this)
    this.rest()
  }

  #place(seq: number, ofBase: boolean): Place {
    const known = this.#open.find((one) => one.seq === seq && one.ofBase === ofBase)
    if (known !== undefined) return known
    const place = { seq, ofBase, key: this.#desk.newKey(), pin: this.#pins.pin(this.#asker.vmDirectory, seq, this.#asker.reason), users: 0 }
    this.#open.push(place)
    return place
  }

  /** Only the newest is kept for the next request, and not for ever. */
  #tidy(): void {
    if (this.#closed) return
    this.#open = this.#open.filter((place, index) => {
      if (place.users > 0 || index === this.#open.length - 1) return true
      this.#close(place)
      return false
    })
    if (this.#waiting === 0) this.#idle = setTimeout(() => this.rest(), this.#idleMs).unref()
  }

  #close(place: Place): void {
    place.pin.release()
    // A worker that is gone has nothing open any more.
    this.#desk.run(this, { is: 'close', key: place.key }).catch(() => undefined)
  }
}
