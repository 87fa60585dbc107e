import { errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { Whereabouts } from './vm-files.ts'

export type MigrationWatchOptions = {
  whereabouts: () => Promise<Whereabouts>
  /** The VM has just come to this node: the lock of the migration that brought it may still be on. */
  arrived: boolean
  /** Capture is kept out of the VM for a migration. */
  isHeld: () => boolean
  hold: () => Promise<void>
  release: () => Promise<void>
  log: Logger
  nowMs?: () => number
}

const RETRY_MS = 1_000

/**
 * Watches for Proxmox's lock on a VM that is about to leave this node: the first that is seen of a migration, a second or more before QEMU's own begins. Capture is
 * held out of the VM until the lock is gone while the VM is still here: the migration did not come about. A VM that is elsewhere is left as it is.
 */
export class MigrationWatch {
  readonly #options: MigrationWatchOptions
  readonly #nowMs: () => number
  #arriving: boolean
  #looking: Promise<void> | undefined
  #notBeforeMs = -Infinity

  constructor(options: MigrationWatchOptions) {
    this.#options = options
    this.#arriving = options.arrived
    this.#nowMs = options.nowMs ?? (() => performance.now())
  }

  /** Called several times a second; one look at a time. */
  look(): Promise<void> {
    return (this.#looking ??= this.#look().finally(() => (this.#looking = undefined)))
  }

  async #look(): Promise<void> {
    if (this.#nowMs() < this.#notBeforeMs) return
    const { whereabouts, isHeld, hold, release, log } = this.#options
    try {
      const found = await whereabouts()
      if (found === 'here') this.#arriving = false
      const leaves = found === 'leaving' && !this.#arriving
      if (leaves && !isHeld()) await hold()
      // A hold may be left of the time when the VM went away.
      if (!leaves && found !== 'elsewhere' && isHeld()) await release()
    } catch (error) {
      log.warn('whether the VM is about to leave this node is not known, or capture could not be taken out of it for that', { error: errorMessage(error) })
      this.#notBeforeMs = this.#nowMs() + RETRY_MS
    }
  }
}
