import { watch } from 'node:fs'
import type { FSWatcher } from 'node:fs'

const POLL_MS = 1_000
/** QEMU makes several files when it starts. */
const DEBOUNCE_MS = 10
const HURRY_POLL_MS = 50

/**
 * Says when to look whether a VM runs: soon after something of it changes in Proxmox's directory of running VMs, and each second in any
 * case, since a directory may be one that tells of nothing, or come later.
 */
export class RunWatch implements Disposable {
  readonly #directory: string
  readonly #prefix: string
  readonly #look: () => void
  #watcher: FSWatcher | undefined
  #poll: NodeJS.Timeout | undefined
  #soon: NodeJS.Timeout | undefined
  #hurry: NodeJS.Timeout | undefined
  #hurryUntilMs = 0

  constructor(directory: string, vmId: number, look: () => void) {
    this.#directory = directory
    this.#prefix = `${vmId}.`
    this.#look = look
  }

  start(): void {
    this.#watch()
    this.#poll = setInterval(() => {
      if (this.#watcher === undefined) this.#watch()
      this.#look()
    }, POLL_MS)
    this.#look()
  }

  /** Looks often for a while: its QEMU is about to end. */
  hurry(forMs: number): void {
    if (this.#poll === undefined) return
    this.#hurryUntilMs = performance.now() + forMs
    this.#hurry ??= setInterval(() => {
      if (performance.now() > this.#hurryUntilMs) this.calm()
      this.#look()
    }, HURRY_POLL_MS)
  }

  /** Ends `hurry`. */
  calm(): void {
    clearInterval(this.#hurry)
    this.#hurry = undefined
  }

  [Symbol.dispose](): void {
    clearInterval(this.#poll)
    clearTimeout(this.#soon)
    this.calm()
    this.#poll = undefined
    this.#unwatch()
  }

  #watch(): void {
    try {
      const watcher = watch(this.#directory, { persistent: false }, (_event, name) => {
        if (name === null || name.startsWith(this.#prefix)) this.#lookSoon()
      })
      this.#watcher = watcher
      watcher.on('error', () => this.#unwatch())
    } catch {
      // No such directory, or no watch left: the poll goes on, and tries again.
      this.#watcher = undefined
    }
  }

  #unwatch(): void {
    this.#watcher?.close()
    this.#watcher = undefined
  }

  #lookSoon(): void {
    this.#soon ??= setTimeout(() => {
      this.#soon = undefined
      this.#look()
    }, DEBOUNCE_MS)
  }
}
