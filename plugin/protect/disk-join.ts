import { setTimeout as sleep } from 'node:timers/promises'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { QemuDisk } from '../qemu/index.ts'
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
  /** That disk belongs to checkpoints from now on. */
  onJoined: (attached: Attached, key: string) => void
}

const RETRY_FIRST_MS = 5_000
const RETRY_MAX_MS = 10 * 60_000

/**
 * The first copy of disks that came, one after the other, beside checkpoints of the others (docs/decisions/disks-that-change.md). What fails is tried again for as
 * long as nothing else has to be done to the VM.
 */
export class DiskJoin {
  readonly #options: DiskJoinOptions
  readonly #ending = new AbortController()
  #attached: Attached
  /** By key: why the last try ended. */
  readonly #failed = new Map<string, string>()

  constructor(options: DiskJoinOptions) {
    this.#options = options
    this.#attached = options.attached
  }

  /** Resolves when all have joined, or it was ended. */
  async run(): Promise<void> {
    const { line } = this.#options
    const { signal } = this.#ending
    for (let pauseMs = RETRY_FIRST_MS; this.#attached.joining.length > 0 && !signal.aborted; pauseMs = Math.min(RETRY_MAX_MS, pauseMs * 2)) {
      for (const disk of this.#attached.joining) {
        this.advanced(0, disk.sizeBytes)
        await line.runLong(() => this.#join(disk)).catch((error: unknown) => this.#noteFailure(disk, error))
        if (signal.aborted) return
      }
      if (this.#attached.joining.length > 0) await sleep(pauseMs, undefined, { signal }).catch(() => undefined)
    }
  }

  /** So much of the one that is copied now is read or known to be equal. */
  advanced(doneBytes: number, totalBytes: number): void {
    if (this.#ending.signal.aborted) return
    const keys = this.#attached.joining.map(({ key }) => key)
    this.#options.onJoining(keys.length === 0 ? undefined : { keys, doneBytes, totalBytes, ...(this.#failed.size === 0 ? {} : { failed: [...this.#failed.values()].join('; ') }) })
  }

  /** Something else goes first. */
  end(why: string): void {
    this.#ending.abort(new CdpError('ABORTED', why, { retry: true }))
  }

  /** The order of its steps is what a crash between two of them relies on. */
  async #join(disk: QemuDisk): Promise<void> {
    const { rateBytesPerSec, onJoined } = this.#options
    const { context, disks, joining, entries, hashes } = this.#attached
    const { signal } = this.#ending
    const whole: Attached = { ...this.#attached, disks: [...disks, disk], joining: joining.filter(({ key }) => key !== disk.key) }
    signal.throwIfAborted()
    const lastSeq = await copyJoining(context, disk, entries, { byHash: hashes, rateBytesPerSec, signal })
    signal.throwIfAborted()
    await context.worker.ask('durable', { seq: lastSeq })
    signal.throwIfAborted()
    await coverFromHere(context, whole.disks, lastSeq)
    signal.throwIfAborted()
    await context.worker.ask('joined', { disks: entries.filter(({ key }) => key === disk.key).map((entry) => entry.disk) })
    // Also if something else goes first now: that finds it among those that belong to checkpoints.
    this.#attached = whole
    this.#failed.delete(disk.key)
    onJoined(whole, disk.key)
    this.advanced(0, 0)
  }

  #noteFailure({ key }: QemuDisk, error: unknown): void {
    if (this.#ending.signal.aborted) return
    const { log, vm } = this.#attached.context
    this.#failed.set(key, `${key}: ${errorMessage(error)}`)
    log.warn('the first copy of a disk did not come to its end', { vmId: vm.vmId, disk: key, error: errorMessage(error) })
    this.advanced(0, 0)
  }
}
