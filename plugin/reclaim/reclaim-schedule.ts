import { join } from 'node:path'
import { errorMessage } from '../../core/errors/index.ts'
import { readJsonFile, writeJsonFile } from '../../core/files/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { DiscardFate } from '../qemu/index.ts'
import type { ReclaimReport, ReclaimVm } from './reclaim.ts'

/** `everyMs` 0: never. Local time; a window may pass midnight, and one whose ends are equal is the whole day. */
export type ReclaimSettings = { everyMs: number; from: string; to: string; maxMs: number }

/** What this node's QEMU does with discards under a mirror job; `why`: it could not be found out. */
export type Discards = { known: true; fate: DiscardFate } | { known: false; why: string }

export type ReclaimScheduleOptions = {
  settings: ReclaimSettings
  stateDirectory: string
  vms: () => readonly ReclaimVm[]
  probe: () => Promise<DiscardFate>
  /** False for a VM that has nothing to be given back. */
  wants: (vmId: number) => Promise<boolean>
  reclaim: (vm: ReclaimVm, maxMs: number) => Promise<ReclaimReport>
  onReclaimed: (vmId: number, report: ReclaimReport) => void
  log: Logger
  now: () => Date
}

const LOOK_EVERY_MS = 60_000
/** QEMU may have been updated. */
const PROBE_EVERY_MS = 86_400_000
const AGAIN_AFTER_MS = 6 * 3_600_000

/**
 * Gives back trimmed space of each streaming VM once in an interval, within a window, one VM at a time; not where QEMU passes discards on by itself. When it was done last is kept in `reclaim-ID.json`;
 * a VM that was never done is due at once, within the window. What fails (no guest agent, a backup runs) is tried again some hours later.
 */
export class ReclaimSchedule implements Disposable {
  readonly #options: ReclaimScheduleOptions
  readonly #notBeforeMs = new Map<number, number>()
  #discards: Discards = { known: false, why: 'it has not been probed yet' }
  #probedMs = -Infinity
  #timer: NodeJS.Timeout | undefined
  #busy = false

  constructor(options: ReclaimScheduleOptions) {
    this.#options = options
  }

  get discards(): Discards {
    return this.#discards
  }

  start(): void {
    if (this.#options.settings.everyMs === 0) {
      this.#discards = { known: false, why: 'nothing is reclaimed, so it was not probed' }
      return
    }
    this.#timer = setInterval(() => void this.look(), LOOK_EVERY_MS).unref()
    void this.look()
  }

  /** Gives back whatever is due. */
  async look(): Promise<void> {
    if (this.#busy) return
    this.#busy = true
    try {
      await this.#probe()
      if (this.#discards.known && this.#discards.fate.reachesStorage && this.#discards.fate.copied !== 'not') return
      for (const vm of this.#options.vms()) {
        if (!isWithin(this.#options.settings, this.#options.now())) return
        if (vm.state.is === 'streaming' && (vm.state.joining === undefined || vm.state.joining.failed !== undefined)) await this.#reclaimIfDue(vm)
      }
    } finally {
      this.#busy = false
    }
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer)
  }

  async #probe(): Promise<void> {
    if (performance.now() - this.#probedMs < PROBE_EVERY_MS) return
    this.#probedMs = performance.now()
    try {
      this.#discards = { known: true, fate: await this.#options.probe() }
    } catch (error) {
      this.#discards = { known: false, why: errorMessage(error) }
      this.#options.log.warn('what QEMU does with discards could not be probed', { error: errorMessage(error) })
    }
  }

  async #reclaimIfDue(vm: ReclaimVm): Promise<void> {
    const { settings, wants, reclaim, onReclaimed, log, now, stateDirectory } = this.#options
    const path = join(stateDirectory, `reclaim-${vm.vmId}.json`)
    const nowMs = now().getTime()
    const notBeforeMs = this.#notBeforeMs.get(vm.vmId) ?? 0
    if (nowMs < notBeforeMs && notBeforeMs <= nowMs + AGAIN_AFTER_MS) return
    try {
      const last = (await readJsonFile(path).catch(() => undefined)) as { atUnixMs?: unknown } | undefined
      const lastMs = typeof last?.atUnixMs === 'number' ? last.atUnixMs : -Infinity
      // One from the future: the clock was wrong then, or is now.
      if (nowMs - lastMs < settings.everyMs && lastMs <= nowMs) return
      if (!(await wants(vm.vmId))) return
      const report = await reclaim(vm, settings.maxMs)
      await writeJsonFile(path, { format: 1, atUnixMs: nowMs, ...report })
      onReclaimed(vm.vmId, report)
    } catch (error) {
      this.#notBeforeMs.set(vm.vmId, nowMs + AGAIN_AFTER_MS)
      log.warn('trimmed space of a VM could not be given back; it is tried again later', { vmId: vm.vmId, error: errorMessage(error) })
    }
  }
}

const minutesOf = (clock: string): number => Number(clock.slice(0, 2)) * 60 + Number(clock.slice(3, 5))

/** Pure. */
export const isWithin = ({ from, to }: Pick<ReclaimSettings, 'from' | 'to'>, at: Date): boolean => {
  const [begin, end, minutes] = [minutesOf(from), minutesOf(to), at.getHours() * 60 + at.getMinutes()]
  if (begin === end) return true
  return begin < end ? minutes >= begin && minutes < end : minutes >= begin || minutes < end
}
