import { Worker } from 'node:worker_threads'
import { CdpError } from '../../core/errors/index.ts'
import type { ErrorCode } from '../../core/errors/index.ts'
import type { CaptureEvent, CaptureRequestName, CaptureRequests, CaptureWorkerData, FromWorker } from './messages.ts'

export type CaptureWorkerOptions = Omit<CaptureWorkerData, 'heartbeat'> & {
  onEvent: (event: CaptureEvent) => void
  /** The thread has ended after `start` had resolved: by dispose, by the watch over its heartbeat, or by a bug. */
  onExit: (why: string) => void
}

/** Next to nothing that a worker allocates lives long: what was needed under load is not kept when there is none. */
const YOUNG_GENERATION_MIB = 8

/** The main thread's handle of one capture worker. */
export class CaptureWorker implements AsyncDisposable {
  readonly #worker: Worker
  readonly #beats: Int32Array
  readonly #waiting = new Map<number, { resolve: (value: unknown) => void; reject: (error: CdpError) => void }>()
  #nextId = 1
  #why = 'it was stopped'
  #exited = false

  private constructor(worker: Worker, beats: Int32Array) {
    this.#worker = worker
    this.#beats = beats
  }

  /** Starts the thread; resolves when its NBD target listens. */
  static async start({ onEvent, onExit, ...data }: CaptureWorkerOptions): Promise<CaptureWorker> {
    const heartbeat = new SharedArrayBuffer(4)
    const workerData: CaptureWorkerData = { ...data, heartbeat }
    const file = import.meta.url.endsWith('.ts') ? './worker.ts' : './worker.js'
    const worker = new Worker(new URL(file, import.meta.url), { workerData, name: `capture-${data.vm}`, resourceLimits: { maxYoungGenerationSizeMb: YOUNG_GENERATION_MIB } })
    const handle = new CaptureWorker(worker, new Int32Array(heartbeat))
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    let listening = false
    worker.on('message', (message: FromWorker) => {
      if ('listening' in message) {
        listening = true
        resolve()
      } else if ('event' in message) onEvent(message.event)
      else handle.#settle(message)
    })
    worker.on('error', (error: unknown) => {
      handle.#why = Error.isError(error) ? (error.stack ?? error.message) : String(error)
    })
    worker.on('exit', () => {
      handle.#exited = true
      const error = new CdpError('CLOSED', `the capture worker of VM ${data.vm} has ended: ${handle.#why}`)
      reject(error)
      for (const { reject: rejectOne } of handle.#waiting.values()) rejectOne(error)
      handle.#waiting.clear()
      if (listening) onExit(handle.#why)
    })
    await promise
    return handle
  }

  /** Grows while the worker's event loop turns. */
  get beat(): number {
    return Atomics.load(this.#beats, 0)
  }

  get exited(): boolean {
    return this.#exited
  }

  ask<Name extends CaptureRequestName>(name: Name, ask: CaptureRequests[Name]['ask']): Promise<CaptureRequests[Name]['answer']> {
    if (this.#exited) return Promise.reject(new CdpError('CLOSED', 'the capture worker has ended'))
    const id = this.#nextId++
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve: (value) => resolve(value as CaptureRequests[Name]['answer']), reject })
      this.#worker.postMessage({ id, name, ask })
    })
  }

  /** Ends the thread at once, even one in an endless loop; its sockets close with it and QEMU lets go. */
  async kill(why: string): Promise<void> {
    this.#why = why
    await this.#worker.terminate()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.#exited) await this.#worker.terminate()
  }

  #settle(message: { id: number } & ({ answer: unknown } | { error: { code: string; message: string; hint?: string } })): void {
    const waiting = this.#waiting.get(message.id)
    this.#waiting.delete(message.id)
    if (waiting === undefined) return
    if ('answer' in message) return waiting.resolve(message.answer)
    const { code, message: text, hint } = message.error
    waiting.reject(new CdpError(code as ErrorCode, text, hint === undefined ? {} : { hint }))
  }
}
