import { setTimeout as sleep } from 'node:timers/promises'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { copyJoining, coverFromHere } from './attach-procedure.ts'
import type { Attached } from './attach-vm.ts'
import type { Joining } from './vm-state.ts'
import type { WorkLine } from './work-line.ts'

export type DiskJoinOptions = {
  /** With the disks that join. */
  attached: Attached
  rateBytesPerSec: number
  line: WorkLine
  onJoining: (joining: Joining | undefined) => void
  /** The disks belong to checkpoints from now on. */
  onJoined: (attached: Attached) => void
  retryFirstMs?: number
}

const RETRY_FIRST_MS = 5_000
const RETRY_MAX_MS = 10 * 60_000

/**
 * The first copy of disks that came, beside checkpoints of the others (docs/decisions/disks-that-change.md). One that fails is tried again for as long as
 * nothing else has to be done to the VM.
 */
export class DiskJoin {
  readonly #options: DiskJoinOptions
  readonly #ending = new AbortController()
  readonly #keys: string[]
  #failed: string | undefined

  constructor(options: DiskJoinOptions) {
    this.#options = options
    this.#keys = options.attached.joining.map(({ key }) => key)
  }

  /** Resolves when they have joined, or it was ended. */
  async run(): Promise<void> {
    const { line, attached: { context: { log, vm } }, retryFirstMs = RETRY_FIRST_MS } = this.#options
    const { signal } = this.#ending
    this.advanced(0, this.#options.attached.joining.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0))
    for (let pauseMs = retryFirstMs; !signal.aborted; pauseMs = Math.min(RETRY_MAX_MS, pauseMs * 2)) {
      try {
        return await line.runLong(() => this.#copy())
      } catch (error) {
        if (signal.aborted) return
        this.#failed = errorMessage(error)
        log.warn('the first copy of a disk did not come to its end', { vmId: vm.vmId, disks: this.#keys.join(' '), error: this.#failed, againInMs: pauseMs })
        this.advanced(0, 0)
        await sleep(pauseMs, undefined, { signal }).catch(() => undefined)
      }
    }
  }

  /** So much of it is read or known to be equal. */
  advanced(doneBytes: number, totalBytes: number): void {
    if (this.#ending.signal.aborted) return
    this.#options.onJoining({ keys: this.#keys, doneBytes, totalBytes, ...(this.#failed === undefined ? {} : { failed: this.#failed }) })
  }

  /** Something else goes first. */
  end(why: string): void {
    this.#ending.abort(new CdpError('ABORTED', why, { retry: true }))
  }

  /** The order of its steps is what a crash between two of them relies on. */
  async #copy(): Promise<void> {
    const { attached, rateBytesPerSec, onJoined, onJoining } = this.#options
    const { context, disks, joining, entries } = attached
    const { signal } = this.#ending
    signal.throwIfAborted()
    const end = (): void => void context.worker.ask('endJoin', { why: errorMessage(signal.reason) }).catch(() => undefined)
    signal.addEventListener('abort', end, { once: true })
    const lastSeq = await copyJoining(context, joining, entries, { byHash: attached.hashes, rateBytesPerSec }).finally(() => signal.removeEventListener('abort', end))
    signal.throwIfAborted()
    await context.worker.ask('durable', { seq: lastSeq })
    signal.throwIfAborted()
    await coverFromHere(context, [...disks, ...joining], lastSeq)
    signal.throwIfAborted()
    await context.worker.ask('joined', { disks: entries.filter(({ key }) => this.#keys.includes(key)).map(({ disk }) => disk) })
    signal.throwIfAborted()
    onJoined({ ...attached, disks: [...disks, ...joining], joining: [] })
    onJoining(undefined)
  }
}
