import { errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { ProtectedVm } from './protected-vm.ts'
import type { VerifyRecords } from './verify-record.ts'

export type VerifyScheduleOptions = {
  /** 0: never by itself. */
  everyMs: number
  vms: () => readonly Pick<ProtectedVm, 'vmId' | 'state' | 'verify'>[]
  records: VerifyRecords
  log: Logger
  nowUnixMs: () => number
  /** How often it looks whether one is due. */
  lookEveryMs?: number
}

const LOOK_EVERY_MS = 60_000
/** One that did not come to its end is tried again after so long: reading a disk is not free. */
const AGAIN_AFTER_MS = 3_600_000

/**
 * Verifies each streaming VM of this node once in an interval, one at a time. Due is a VM whose newest verify, or whose first sight by this plugin if
 * there was none, is an interval ago; wall time, since it outlives the plugin. A verify that did not come to its end is due again an hour later.
 */
export class VerifySchedule implements Disposable {
  readonly #options: VerifyScheduleOptions
  readonly #firstSeen = new Map<number, number>()
  readonly #notBefore = new Map<number, number>()
  #timer: NodeJS.Timeout | undefined
  #busy = false

  constructor(options: VerifyScheduleOptions) {
    this.#options = options
  }

  start(): void {
    if (this.#options.everyMs > 0) this.#timer = setInterval(() => void this.look(), this.#options.lookEveryMs ?? LOOK_EVERY_MS).unref()
  }

  /** Verifies whoever is due, one after the other. */
  async look(): Promise<void> {
    if (this.#busy) return
    this.#busy = true
    try {
      for (const vm of this.#options.vms()) if (vm.state.is === 'streaming' && (vm.state.joining === undefined || vm.state.joining.failed !== undefined)) await this.#verifyIfDue(vm)
    } finally {
      this.#busy = false
    }
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer)
  }

  async #verifyIfDue(vm: Pick<ProtectedVm, 'vmId' | 'verify'>): Promise<void> {
    const { log, nowUnixMs } = this.#options
    try {
      if (await this.#isDue(vm.vmId)) await vm.verify()
    } catch (error) {
      this.#notBefore.set(vm.vmId, nowUnixMs() + AGAIN_AFTER_MS)
      log.warn('a scheduled verify did not come to its end', { vmId: vm.vmId, error: errorMessage(error) })
    }
  }

  async #isDue(vmId: number): Promise<boolean> {
    const { records, nowUnixMs, everyMs } = this.#options
    const now = nowUnixMs()
    const last = (await records.read(vmId))?.atUnixMs ?? this.#firstSeen.get(vmId)
    if (last === undefined) {
      this.#firstSeen.set(vmId, now)
      return false
    }
    const notBefore = this.#notBefore.get(vmId) ?? 0
    if (now < notBefore && notBefore <= now + AGAIN_AFTER_MS) return false
    // A record from the future: the clock was wrong then, or is now.
    return now - last >= everyMs || last > now + everyMs
  }
}
