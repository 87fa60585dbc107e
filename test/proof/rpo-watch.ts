import { setTimeout as delay } from 'node:timers/promises'
import type { Sites } from '../lab/sites.ts'

const EVERY_MS = 200

/** Asks the agent again and again how old the newest valid checkpoint is. */
export class RpoWatch {
  maxMs = 0
  readonly #sites: Sites
  readonly #vpg: string
  readonly #mayFail: boolean
  readonly #ending = new AbortController()
  #running: Promise<void> = Promise.resolve()

  private constructor(sites: Sites, vpg: string, mayFail: boolean) {
    this.#sites = sites
    this.#vpg = vpg
    this.#mayFail = mayFail
  }

  /** @param mayFail the agent may be gone for a while */
  static start(sites: Sites, vpg: string, mayFail: boolean): RpoWatch {
    const watch = new RpoWatch(sites, vpg, mayFail)
    watch.#running = watch.#run()
    watch.#running.catch(() => undefined)
    return watch
  }

  describe(): string {
    return `worst RPO ${Math.round(this.maxMs)} ms`
  }

  async stop(): Promise<void> {
    this.#ending.abort()
    await this.#running
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#ending.abort()
    await this.#running.catch(() => undefined)
  }

  async #run(): Promise<void> {
    const { signal } = this.#ending
    while (!signal.aborted) {
      const status = await this.#sites.agentStatus().catch((error: unknown) => {
        if (this.#mayFail) return undefined
        throw error
      })
      const rpoMs = status?.vpgs.find(({ name }) => name === this.#vpg)?.rpoMs
      if (rpoMs !== undefined && rpoMs !== null && rpoMs > this.maxMs) this.maxMs = rpoMs
      await delay(EVERY_MS, undefined, { signal }).catch(() => undefined)
    }
  }
}
