import { Worker } from 'node:worker_threads'
import { CdpError } from '../../core/errors/index.ts'
import type { SealRequest, SealResult } from './seal-segment.ts'
import type { SealingAnswer, SealingJob } from './sealing-worker.ts'
import type { VerifiedSegment, VerifyRequest } from './verify-segment.ts'

const workerUrl = (): URL => new URL(import.meta.url.endsWith('.ts') ? './sealing-worker.ts' : './sealing-worker.js', import.meta.url)

type Job = { job: SealingJob; resolve: (answer: SealingAnswer) => void; reject: (error: CdpError) => void }

/**
 * Seals and verifies segments in a worker thread, one at a time, for all VMs of the agent. A VM has at most one segment to seal
 * and one to verify under way, so the queue is as long as there are VMs; `maxQueued` bounds it all the same.
 */
export class SegmentSealer implements AsyncDisposable {
  readonly #maxQueued: number
  readonly #queue: Job[] = []
  #worker: Worker | undefined
  #current: Job | undefined
  #nextId = 1
  #closed = false

  constructor(options: { maxQueued?: number } = {}) {
    this.#maxQueued = options.maxQueued ?? 4096
  }

  /** @throws CdpError IO if the files refuse, CLOSED if the sealer is closed: the segment stays as it is and is sealed later */
  async seal(request: SealRequest): Promise<SealResult> {
    const answer = await this.#run({ id: this.#nextId++, is: 'seal', request })
    if (answer.is !== 'sealed') throw new CdpError('INTERNAL', 'the sealing worker answered something else')
    return answer.result
  }

  /** @throws CdpError IO, CLOSED */
  async verify(request: VerifyRequest): Promise<VerifiedSegment> {
    const answer = await this.#run({ id: this.#nextId++, is: 'verify', request })
    if (answer.is !== 'verified') throw new CdpError('INTERNAL', 'the sealing worker answered something else')
    return answer.result
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    this.#dropAll('the sealer was closed')
    const worker = this.#worker
    this.#worker = undefined
    await worker?.terminate()
  }

  #run(job: SealingJob): Promise<SealingAnswer> {
    if (this.#closed) return Promise.reject(new CdpError('CLOSED', 'the sealer is closed'))
    if (this.#queue.length >= this.#maxQueued) return Promise.reject(new CdpError('CONFLICT', 'too many segments wait to be sealed', { retry: true }))
    return new Promise((resolve, reject) => {
      this.#queue.push({ job, resolve, reject })
      this.#next()
    })
  }

  #next(): void {
    if (this.#current !== undefined) return
    this.#current = this.#queue.shift()
    if (this.#current === undefined) {
      this.#worker?.unref()
      return
    }
    this.#worker ??= this.#start()
    this.#worker.ref()
    this.#worker.postMessage(this.#current.job)
  }

  #start(): Worker {
    const worker = new Worker(workerUrl(), { name: 'sealer' })
    worker.on('message', (answer: SealingAnswer) => {
      const current = this.#current
      if (current === undefined || current.job.id !== answer.id) return
      this.#current = undefined
      if (answer.is === 'failed') current.reject(new CdpError('IO', answer.message, { context: { code: answer.code } }))
      else current.resolve(answer)
      this.#next()
    })
    const gone = (message: string): void => {
      if (this.#worker !== worker) return
      this.#worker = undefined
      const current = this.#current
      this.#current = undefined
      current?.reject(new CdpError('IO', message))
      this.#next()
    }
    worker.on('error', (error) => gone(`the sealing worker failed: ${String(error)}`))
    worker.on('exit', (code) => gone(`the sealing worker ended with code ${code}`))
    return worker
  }

  #dropAll(message: string): void {
    const dropped = this.#current === undefined ? this.#queue.splice(0) : [this.#current, ...this.#queue.splice(0)]
    this.#current = undefined
    for (const { reject } of dropped) reject(new CdpError('CLOSED', message))
  }
}
