import { Worker } from 'node:worker_threads'
import { CdpError } from '../../core/errors/index.ts'
import type { SealRequest, SealResult } from './seal-segment.ts'
import type { SealingAnswer, SealingJob } from './sealing-worker.ts'
import type { VerifiedSegment, VerifyRequest } from './verify-segment.ts'

const workerUrl = (): URL => new URL(import.meta.url.endsWith('.ts') ? './sealing-worker.ts' : './sealing-worker.js', import.meta.url)

type Job = { job: SealingJob; resolve: (answer: SealingAnswer) => void; reject: (error: CdpError) => void }

/** Jobs of one kind, one at a time. */
type Lane = { readonly queue: Job[]; current: Job | undefined }

/**
 * Seals and verifies segments in a worker thread, for all VMs of the agent: one to seal at a time, and one to verify beside it, since a verify at
 * a low rate takes long and mostly waits. A VM has at most one of each under way, so the queues are as long as there are VMs; `maxQueued` bounds them all the same.
 */
export class SegmentSealer implements AsyncDisposable {
  readonly #maxQueued: number
  readonly #lanes: Record<SealingJob['is'], Lane> = { seal: { queue: [], current: undefined }, verify: { queue: [], current: undefined } }
  #worker: Worker | undefined
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
    const lane = this.#lanes[job.is]
    if (this.#closed) return Promise.reject(new CdpError('CLOSED', 'the sealer is closed'))
    if (lane.queue.length >= this.#maxQueued) return Promise.reject(new CdpError('CONFLICT', `too many segments wait for ${job.is}`, { retry: true }))
    return new Promise((resolve, reject) => {
      lane.queue.push({ job, resolve, reject })
      this.#next(lane)
    })
  }

  #next(lane: Lane): void {
    if (lane.current !== undefined) return
    lane.current = lane.queue.shift()
    if (lane.current === undefined) {
      if (this.#all().every(({ current }) => current === undefined)) this.#worker?.unref()
      return
    }
    this.#worker ??= this.#start()
    this.#worker.ref()
    this.#worker.postMessage(lane.current.job)
  }

  #all(): Lane[] {
    return Object.values(this.#lanes)
  }

  #start(): Worker {
    const worker = new Worker(workerUrl(), { name: 'sealer' })
    worker.on('message', (answer: SealingAnswer) => {
      const lane = this.#all().find(({ current }) => current?.job.id === answer.id)
      const current = lane?.current
      if (lane === undefined || current === undefined) return
      lane.current = undefined
      if (answer.is === 'failed') current.reject(new CdpError('IO', answer.message, { context: { code: answer.code } }))
      else current.resolve(answer)
      this.#next(lane)
    })
    const gone = (message: string): void => {
      if (this.#worker !== worker) return
      this.#worker = undefined
      for (const lane of this.#all()) {
        const { current } = lane
        lane.current = undefined
        current?.reject(new CdpError('IO', message))
        this.#next(lane)
      }
    }
    worker.on('error', (error) => gone(`the sealing worker failed: ${String(error)}`))
    worker.on('exit', (code) => gone(`the sealing worker ended with code ${code}`))
    return worker
  }

  #dropAll(message: string): void {
    for (const lane of this.#all()) {
      const dropped = [...(lane.current === undefined ? [] : [lane.current]), ...lane.queue.splice(0)]
      lane.current = undefined
      for (const { reject } of dropped) reject(new CdpError('CLOSED', message))
    }
  }
}
