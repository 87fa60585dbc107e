import { errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { CaptureWorker } from '../capture/index.ts'
import type { VmLook } from '../qemu/index.ts'
import type { Finding } from './capture-prover.ts'

export type RotationOptions = {
  worker: Pick<CaptureWorker, 'ask'>
  /** Runs when nothing else is done to the VM; undefined if capture is not the one any more that this rotation belongs to. */
  exclusively: <T>(work: () => Promise<T>) => Promise<T | undefined>
  /** In one QMP connection: the bitmap that records stands still from now on, another one records; then, as a second command that drains, a drained look. */
  rotate: () => Promise<VmLook>
  /** Compares that look; acts on what it finds. */
  check: (look: () => Promise<VmLook>) => Promise<Finding>
  /** Removes the bitmaps that stand still: everything up to `seq` is durable. */
  retire: (seq: number) => Promise<void>
  /** Resolves when the agent holds that sequence durably; rejects when capture is lost. */
  durable: (seq: number) => Promise<void>
  log: Logger
}

/**
 * Keeps the set small that has to be copied after a loss of capture (semantics.md, Sync). Every turn the bitmap that records is set aside, another one
 * takes its place, and the one set aside is removed as soon as nothing in it is only here.
 *
 * A bit is set when the source write ends, the copy arrives later. So the sequence that covers a bitmap is not the one at its rotation:
 * it is the one after a *second* command that drains, by which the copies of all writes with a bit in it have arrived.
 * The look that comes with it is checked first: a write that failed at the source is in the bitmap and never arrives.
 */
export class BitmapRotation {
  readonly #options: RotationOptions
  #rotatedAtBytes: number
  #busy = false

  /** @param capturedBytes what the worker had captured when the bitmaps were retired last, over all disks */
  constructor(options: RotationOptions, capturedBytes: number) {
    this.#options = options
    this.#rotatedAtBytes = capturedBytes
  }

  /** One turn, to the retirement. Nothing happens while nothing was written, or while the turn before waits for the agent. */
  async turn(): Promise<void> {
    if (this.#busy) return
    this.#busy = true
    try {
      await this.#turn()
    } catch (error) {
      this.#options.log.debug('a rotation of dirty bitmaps did not come to its end; the next one goes on with it', { error: errorMessage(error) })
    } finally {
      this.#busy = false
    }
  }

  async #turn(): Promise<void> {
    const { worker, exclusively, rotate, check, retire, durable } = this.#options
    const { bytes } = await worker.ask('captured', {})
    const capturedBytes = totalOf(bytes)
    if (capturedBytes === this.#rotatedAtBytes) return
    const finding = await exclusively(() => check(rotate))
    if (finding?.is !== 'proved') return
    await durable(finding.seq)
    await exclusively(async () => {
      await retire(finding.seq)
      this.#rotatedAtBytes = capturedBytes
    })
  }
}

export const totalOf = (bytes: Record<string, number>): number => Object.values(bytes).reduce((sum, one) => sum + one, 0)
