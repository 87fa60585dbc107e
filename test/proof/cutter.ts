import { setTimeout as delay } from 'node:timers/promises'
import type { CutBracket, WriteHistory } from '../../agent/proof/index.ts'
import { pluginApi } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import type { LabDaemon } from '../lab/sites.ts'
import type { Load } from './load.ts'
import { Random } from '../kit/random.ts'
import { DISK_COUNT, VPG } from './rig.ts'

export type CutterOptions = { /** Of all nodes: any of them can be asked. */ plugins: readonly LabDaemon[]; history: WriteHistory; load: Load; seed: number; meanPauseMs: number; /** The plugin may be gone for a while. */ mayFail: boolean }

const SPRINT_MS = 12

/**
 * Asks the plugin for tagged checkpoints at random moments, one or several at once, two thirds of them while the writers sprint, and remembers
 * what was acknowledged around each.
 */
export class Cutter {
  /** Checkpoint id -> what is known of its moment. */
  readonly brackets = new Map<string, CutBracket>()
  /** Requests that the plugin abandoned or refused for the moment. */
  refused = 0
  readonly #plugins: readonly LabDaemon[]
  readonly #history: WriteHistory
  readonly #load: Load
  readonly #random: Random
  readonly #mayFail: boolean
  readonly #ending = new AbortController()
  #running: Promise<void> = Promise.resolve()

  private constructor({ plugins, history, load, seed, mayFail }: CutterOptions) {
    this.#mayFail = mayFail
    this.#plugins = plugins
    this.#history = history
    this.#load = load
    this.#random = new Random(seed)
  }

  /** Cuts until stopped. `meanPauseMs` lies between two requests, or bursts of up to three, on average. */
  static start(options: CutterOptions): Cutter {
    const cutter = new Cutter(options)
    cutter.#running = cutter.#run(options.meanPauseMs)
    cutter.#running.catch(() => undefined)
    return cutter
  }

  /** @throws what went wrong, unless it was an abandoned cut */
  async stop(): Promise<void> {
    this.#ending.abort()
    await this.#running
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#ending.abort()
    await this.#running.catch(() => undefined)
  }

  async #run(meanPauseMs: number): Promise<void> {
    const random = this.#random
    const { signal } = this.#ending
    while (!signal.aborted) {
      if (random.chance(0.67)) {
        this.#load.sprint(SPRINT_MS, random.int(0, DISK_COUNT))
        await delay(random.int(0, 8))
      }
      const burst = random.chance(0.2) ? random.int(2, 4) : 1
      await Promise.all(Array.from({ length: burst }, () => this.#cut()))
      const pauseMs = -Math.log(1 - random.u32() / 0x1_0000_0000) * meanPauseMs
      await delay(pauseMs, undefined, { signal }).catch(() => undefined)
    }
  }

  async #cut(): Promise<void> {
    const plugin = this.#plugins.length === 1 ? this.#plugins[0] : this.#plugins[this.#random.int(0, this.#plugins.length)]
    const ackedBefore = this.#history.knowledge.slice()
    try {
      const { checkpointId } = await plugin.api.call(pluginApi.tagCheckpoint, { params: { name: VPG }, body: { tag: 'proof' } })
      this.brackets.set(checkpointId, { ackedBefore, submittedAfter: this.#history.submitted.slice() })
    } catch (error) {
      const passes = error instanceof CdpError && (error.code === 'CONFLICT' || (this.#mayFail && (error.code === 'UNREACHABLE' || error.code === 'NOT_FOUND')))
      if (!passes) throw error
      this.refused++
    }
  }
}
