import { join } from 'node:path'
import { errorMessage } from '../../core/errors/index.ts'
import { readJsonFile, removeFile, writeJsonFile } from '../../core/files/index.ts'
import type { Logger } from '../../core/log/index.ts'

/** Somebody wants capture out of a VM for a while. One per owner. */
export type Hold = { owner: string; reason: string; sinceUnixMs: number; untilUnixMs: number }
export type HoldRequest = { owner: string; reason: string; forMs: number }

export type SuspensionOptions = {
  stateDirectory: string
  vmId: number
  log: Logger
  nowUnixMs: () => number
  /** Somebody holds it now, and that is on disk; or somebody does not any more. */
  onChange: () => void
  /** A hold ended at its limit and is gone; told before `onChange`. */
  onExpired: (hold: Hold) => void
}

const isHold = (value: unknown): value is Hold => {
  const { owner, reason, sinceUnixMs, untilUnixMs } = (value ?? {}) as Partial<Hold>
  return typeof owner === 'string' && typeof reason === 'string' && typeof sinceUnixMs === 'number' && typeof untilUnixMs === 'number' && untilUnixMs >= sinceUnixMs
}

/**
 * Who holds capture of one VM suspended, on disk before anything is done about it. A hold that cannot be written counts all the same: what
 * its owner is about to do must not fail because of us. Limits are counted on the monotonic clock while the plugin lives.
 */
export class Suspension {
  readonly #options: SuspensionOptions
  readonly #path: string
  readonly #holds = new Map<string, { hold: Hold; limit: NodeJS.Timeout }>()
  #loaded: Promise<void> | undefined
  #writing: Promise<void> = Promise.resolve()
  #disposed = false

  constructor(options: SuspensionOptions) {
    this.#options = options
    this.#path = join(options.stateDirectory, `suspended-${options.vmId}.json`)
  }

  /** Oldest first. */
  get holds(): readonly Hold[] {
    return [...this.#holds.values()].map(({ hold }) => hold)
  }

  /** The reason of the state, for people; undefined while nobody holds it. */
  get why(): string | undefined {
    if (this.#holds.size === 0) return undefined
    return `held by ${this.holds.map(({ owner, reason }) => `${owner}: ${reason}`).join('; ')}`
  }

  /** Takes up what an earlier life of the plugin left. Idempotent. A file that cannot be read holds nothing. */
  load(): Promise<void> {
    return (this.#loaded ??= this.#load())
  }

  async add({ owner, reason, forMs }: HoldRequest): Promise<Hold> {
    await this.load()
    const sinceUnixMs = this.#options.nowUnixMs()
    const hold = { owner, reason, sinceUnixMs, untilUnixMs: sinceUnixMs + forMs }
    this.#keep(hold, forMs)
    await this.#save()
    this.#options.onChange()
    return hold
  }

  /** False if that owner holds nothing. */
  async release(owner: string): Promise<boolean> {
    await this.load()
    const found = this.#holds.get(owner)
    if (found === undefined) return false
    clearTimeout(found.limit)
    this.#holds.delete(owner)
    // What waits for it does not wait for the disk: written too late, it holds longer than it should, up to its limit.
    this.#options.onChange()
    await this.#save()
    return true
  }

  /** Ends timers; what is on disk stays. */
  [Symbol.dispose](): void {
    this.#disposed = true
    for (const { limit } of this.#holds.values()) clearTimeout(limit)
  }

  /** Protection has ended: nothing is left to be held. */
  async forget(): Promise<void> {
    this[Symbol.dispose]()
    this.#holds.clear()
    await this.#writing
    await removeFile(this.#path)
  }

  async #load(): Promise<void> {
    const file = (await readJsonFile(this.#path).catch((error: unknown) => {
      this.#options.log.warn('who held capture suspended cannot be read: nobody does', { vmId: this.#options.vmId, error: errorMessage(error) })
      return undefined
    })) as { holds?: unknown } | undefined
    const nowUnixMs = this.#options.nowUnixMs()
    for (const hold of Array.isArray(file?.holds) ? file.holds.filter(isHold) : []) {
      // A clock that was stepped back makes no hold longer than was asked for.
      const leftMs = Math.min(hold.untilUnixMs - nowUnixMs, hold.untilUnixMs - hold.sinceUnixMs)
      if (leftMs > 0) this.#keep({ ...hold, untilUnixMs: nowUnixMs + leftMs }, leftMs)
    }
  }

  #keep(hold: Hold, leftMs: number): void {
    clearTimeout(this.#holds.get(hold.owner)?.limit)
    if (this.#disposed) return
    const limit = setTimeout(() => void this.#expire(hold), leftMs)
    this.#holds.set(hold.owner, { hold, limit })
  }

  async #expire(hold: Hold): Promise<void> {
    this.#holds.delete(hold.owner)
    this.#options.onExpired(hold)
    this.#options.onChange()
    await this.#save()
  }

  #save(): Promise<void> {
    this.#writing = this.#writing.then(async () => {
      const { holds } = this
      try {
        if (holds.length === 0) await removeFile(this.#path)
        else await writeJsonFile(this.#path, { format: 1, holds })
      } catch (error) {
        this.#options.log.warn('who holds capture suspended could not be written; a plugin that is started again will not know', { vmId: this.#options.vmId, error: errorMessage(error) })
      }
    })
    return this.#writing
  }
}
