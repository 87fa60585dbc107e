import { rm } from 'node:fs/promises'
import { Worker } from 'node:worker_threads'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { ErrorCode } from '../../core/errors/index.ts'
import { RUN_FANOUT } from './merge-vm.ts'
import type { MergeReport } from './merge-vm.ts'

type Reply = { report: MergeReport } | { error: { code: ErrorCode; message: string } }

export type RunMergerOptions = {
  fanout?: number
  onMerged?: (vmDirectory: string, report: MergeReport) => void
  /** Merging failed; it is tried again when the next segment is sealed. */
  onError?: (vmDirectory: string, error: CdpError) => void
}

/**
 * Merges index runs in the background, for all VMs of an agent in one worker thread, one VM at a time. It is told when
 * a segment was sealed; it is harmless to tell it too often. The worker starts with the first job.
 */
export class RunMerger {
  readonly #options: RunMergerOptions
  readonly #waiting = new Set<string>()
  #worker: Worker | undefined
  #running: Promise<void> | undefined
  #closed = false

  constructor(options: RunMergerOptions = {}) {
    this.#options = options
  }

  /** A segment of this VM was sealed, or a run of it is missing. */
  notify(vmDirectory: string): void {
    if (this.#closed) return
    this.#waiting.add(vmDirectory)
    this.#running ??= this.#work().finally(() => (this.#running = undefined))
  }

  /** Takes a damaged merged run away and has it made again. Views that have it open bypass it. */
  async rebuild(vmDirectory: string, runPath: string): Promise<void> {
    if (!runPath.endsWith('.run')) return
    await rm(runPath, { force: true })
    this.notify(vmDirectory)
  }

  /** Resolves when nothing is waiting or under way. */
  async idle(): Promise<void> {
    await this.#running
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    this.#waiting.clear()
    const worker = this.#worker
    this.#worker = undefined
    // A run cut short here is a .tmp file, which the next pass removes.
    await worker?.terminate()
    await this.#running
  }

  async #work(): Promise<void> {
    for (const vmDirectory of this.#waiting) {
      this.#waiting.delete(vmDirectory)
      try {
        const report = await this.#mergeIn(vmDirectory)
        if (report === undefined) return
        if (report.damaged.length > 0 && report.damaged.some((run) => run.path.endsWith('.run'))) this.#waiting.add(vmDirectory)
        this.#options.onMerged?.(vmDirectory, report)
      } catch (error) {
        const cause = error as { code?: ErrorCode }
        this.#options.onError?.(vmDirectory, new CdpError(cause.code ?? 'INTERNAL', errorMessage(error), { cause: error }))
      }
    }
  }

  /** One job in the worker; undefined if the merger was closed meanwhile. */
  #mergeIn(vmDirectory: string): Promise<MergeReport | undefined> {
    const worker = (this.#worker ??= startWorker())
    return new Promise((resolve, reject) => {
      const settle = (action: () => void): void => {
        worker.off('message', onMessage).off('error', onError).off('exit', onExit)
        action()
      }
      const onMessage = (reply: Reply): void => settle(() => ('report' in reply ? resolve(reply.report) : reject(new CdpError(reply.error.code, reply.error.message))))
      const onError = (error: unknown): void => settle(() => {
        this.#worker = undefined
        reject(error)
      })
      const onExit = (): void => settle(() => resolve(undefined))
      worker.on('message', onMessage).on('error', onError).on('exit', onExit)
      worker.postMessage({ vmDirectory, fanout: this.#options.fanout ?? RUN_FANOUT })
    })
  }
}

const startWorker = (): Worker => {
  const worker = new Worker(new URL(import.meta.url.endsWith('.ts') ? './merge-worker.ts' : './merge-worker.js', import.meta.url))
  worker.unref()
  return worker
}
