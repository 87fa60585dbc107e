import { join } from 'node:path'
import { errorMessage } from '../../core/errors/index.ts'
import { readJsonFile, removeFile, writeJsonFile } from '../../core/files/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { FIRST_GENERATION } from '../../core/stream/index.ts'
import type { Disowned } from '../capture/index.ts'

/** The recovery site owns the group in `generation`; `why` and `hint` are for people. */
export type Fence = { generation: number; why: string; hint: string; sinceUnixMs: number }

export type GroupFenceOptions = {
  stateDirectory: string
  vpg: string
  /** In which this site has the group; an older fence does not hold it back. */
  generation?: number | undefined
  log: Logger
  nowUnixMs: () => number
}

const isFence = (value: unknown): value is Fence => {
  const { generation, why, hint, sinceUnixMs } = (value ?? {}) as Partial<Fence>
  return Number.isSafeInteger(generation) && typeof why === 'string' && typeof hint === 'string' && typeof sinceUnixMs === 'number'
}

/**
 * Whether a group was taken over by the recovery site: then none of its VMs is captured any more. It holds at once; what could not be written, or read
 * again, the recovery site says anew before anything is attached.
 */
export class GroupFence {
  readonly #options: GroupFenceOptions
  readonly #path: string
  readonly #listeners = new Set<(fence: Fence) => void>()
  #standing: Fence | undefined
  #loaded: Promise<void> | undefined
  #writing: Promise<void> = Promise.resolve()

  constructor(options: GroupFenceOptions) {
    this.#options = options
    this.#path = join(options.stateDirectory, `fence-${encodeURIComponent(options.vpg)}.json`)
  }

  get generation(): number {
    return this.#options.generation ?? FIRST_GENERATION
  }

  get standing(): Fence | undefined {
    return this.#standing
  }

  /** The reason of the VMs' state, with what to do about it. */
  get why(): string | undefined {
    return this.#standing && `${this.#standing.why}. ${this.#standing.hint}`
  }

  /** Is told when the fence goes up. */
  subscribe(listener: (fence: Fence) => void): () => void {
    this.#listeners.add(listener)
    return () => this.#listeners.delete(listener)
  }

  /** Takes up what an earlier life of the plugin left. Idempotent. */
  load(): Promise<void> {
    return (this.#loaded ??= this.#load())
  }

  raise({ generation, message, hint }: Disowned): void {
    if (generation <= (this.#standing?.generation ?? this.generation)) return
    const wasUp = this.#standing !== undefined
    const fence = { generation, why: message, hint: hint ?? '', sinceUnixMs: this.#options.nowUnixMs() }
    this.#standing = fence
    this.#writing = this.#writing.then(() => writeJsonFile(this.#path, { format: 1, ...fence })).catch((error: unknown) => {
      this.#options.log.warn('that the group is fenced could not be written', { vpg: this.#options.vpg, error: errorMessage(error) })
    })
    if (!wasUp) for (const listener of this.#listeners) listener(fence)
  }

  /** What was raised is on disk, as far as it could be written. */
  settled(): Promise<void> {
    return this.#writing
  }

  /** Protection of the group has ended. */
  async forget(): Promise<void> {
    await this.#writing
    this.#standing = undefined
    await removeFile(this.#path)
  }

  async #load(): Promise<void> {
    const { log, vpg } = this.#options
    const found = await readJsonFile(this.#path).catch((error: unknown) => {
      log.warn('whether the group is fenced cannot be read: the recovery site will say', { vpg, error: errorMessage(error) })
      return undefined
    })
    if (isFence(found) && found.generation > this.generation) this.#standing ??= { generation: found.generation, why: found.why, hint: found.hint, sinceUnixMs: found.sinceUnixMs }
  }
}
