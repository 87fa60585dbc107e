import { Worker } from 'node:worker_threads'
import { adaptiveZstd } from '../../core/record/index.ts'
import type { Compressor, FrameBuilder, FrameSeal, SealedFrame } from '../../core/record/index.ts'
import type { SealingAnswer, SealingJob } from './seal-parts.ts'

/** A finished frame. `keepsSlab`: its payload is the builder's slab itself. */
export type Sealed = SealedFrame & { keepsSlab: boolean }

/** Finishes frames: compression and checksums. */
export type FrameSealer = {
  /** Finishes the builder's frame; `done` is called once, in the order of the calls, perhaps before this returns. The builder is not touched in between. */
  seal(builder: FrameBuilder, seal: FrameSeal, done: (sealed: Sealed) => void): void
}

/** Seals where it is called. */
export const inlineSealer = (compressor: Compressor): FrameSealer => ({ seal: (builder, seal, done) => done(builder.seal(seal, compressor)) })

/** Up to so much payload is sealed faster than it is sent to another thread and back. */
const INLINE_BYTES = 32 * 1024
/** A thread costs as much memory as the rest of an idle VM: it is started for more than that in large frames within a second. */
const START_BYTES = 4 * 1024 * 1024
const START_WITHIN_MS = 1_000
const IDLE_MS = 20_000
const IDLE_CHECK_MS = 5_000

/**
 * Seals large frames in a thread of its own, so that acknowledgements do not wait for compression or checksums. The thread is started when
 * there are more such frames than now and then, and ends when there has been none for a while: a VM that is idle does not pay for it. Payload
 * and table move there and back, nothing is copied.
 */
export class SealingThread implements FrameSealer, AsyncDisposable {
  readonly #compressor = adaptiveZstd()
  readonly #onLost: (why: string) => void
  readonly #onStart: (worker: Worker) => void
  #worker: Worker | undefined
  #ready = false
  #away: { builder: FrameBuilder; seal: FrameSeal; done: (sealed: Sealed) => void }[] = []
  #usedMs = 0
  /** Large frames since then. */
  #sinceMs = 0
  #largeBytes = 0
  #idleCheck: NodeJS.Timeout | undefined

  /**
   * @param onLost the thread died: frames that were in it are gone, and what was recorded after them has no place any more
   * @param onStart is shown each thread
   */
  constructor(onLost: (why: string) => void, onStart: (worker: Worker) => void = () => undefined) {
    this.#onLost = onLost
    this.#onStart = onStart
  }

  seal(builder: FrameBuilder, seal: FrameSeal, done: (sealed: Sealed) => void): void {
    const small = builder.payloadBytes <= INLINE_BYTES
    if (!small && this.#worker === undefined && this.#isWorthAThread(builder.payloadBytes)) this.#worker = this.#start()
    const worker = this.#worker
    // Frames never wait for the thread to start: meanwhile memory would fill.
    if (worker === undefined || !this.#ready || (small && this.#away.length === 0)) return done(builder.seal(seal, this.#compressor))
    this.#away.push({ builder, seal, done })
    this.#usedMs = performance.now()
    const parts = builder.give()
    worker.postMessage({ seal, parts } satisfies SealingJob, [parts.payload.buffer as ArrayBuffer, parts.table.buffer as ArrayBuffer])
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#away = []
    await this.#end()
  }

  #isWorthAThread(lengthBytes: number): boolean {
    const nowMs = performance.now()
    if (nowMs - this.#sinceMs > START_WITHIN_MS) {
      this.#sinceMs = nowMs
      this.#largeBytes = 0
    }
    this.#largeBytes += lengthBytes
    return this.#largeBytes > START_BYTES
  }

  #start(): Worker {
    const file = import.meta.url.endsWith('.ts') ? './sealing-thread.ts' : './sealing-thread.js'
    const worker = new Worker(new URL(file, import.meta.url), { name: 'sealing' })
    this.#onStart(worker)
    worker.unref()
    this.#ready = false
    worker.on('message', (answer: SealingAnswer | 'ready') => {
      if (this.#worker !== worker) return
      if (answer === 'ready') this.#ready = true
      else this.#take(answer)
    })
    const gone = (why: string): void => {
      if (this.#worker !== worker) return
      this.#worker = undefined
      clearInterval(this.#idleCheck)
      this.#away = []
      this.#onLost(why)
    }
    worker.on('error', (error: unknown) => gone(Error.isError(error) ? error.message : String(error)))
    worker.on('exit', (code) => gone(`it ended with code ${code}`))
    this.#idleCheck = setInterval(() => {
      if (this.#away.length === 0 && performance.now() - this.#usedMs > IDLE_MS) void this.#end()
    }, IDLE_CHECK_MS).unref()
    return worker
  }

  async #end(): Promise<void> {
    clearInterval(this.#idleCheck)
    const worker = this.#worker
    this.#worker = undefined
    await worker?.terminate()
  }

  #take({ head, payload, parts }: SealingAnswer): void {
    const first = this.#away.shift()
    if (first === undefined) return
    const { builder, seal, done } = first
    builder.takeBack(parts)
    const stored = payload === undefined ? builder.payload.subarray(0, builder.payloadBytes) : asBuffer(payload)
    const lastSeq = seal.firstSeq + builder.recordCount - 1
    done({ firstSeq: seal.firstSeq, lastSeq, head: asBuffer(head), payload: stored, lengthBytes: head.length + stored.length, keepsSlab: payload === undefined })
  }
}

const asBuffer = (bytes: Uint8Array): Buffer => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
