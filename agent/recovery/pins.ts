import { leftHistory } from './base-state.ts'

/** What a pin is for, by the VM's directory (VM ids repeat between sites); shown to the operator who asks why promotion waits. */
export type PinInfo = { vmDirectory: string; seq: number; reason: string; sinceUnixMs: number }

/** Held while something reads the base at `seq`; releasing twice is harmless. */
export type Pin = PinInfo & { release(): void }

/**
 * Which sequences of which VMs are being read: promotion moves a VM's base up to `lowest(vmDirectory)` and no further. Kept in memory:
 * whoever needs a pin over a restart asks for it again before promotion begins.
 *
 * `pin` and `reserve` are each one turn of the event loop, and nothing else decides: either the pin is there first and the promotion stays
 * below it, or the promotion's floor is there first and the pin is refused. Only then anybody looks at, or writes, a file.
 */
export class PinRegistry {
  readonly #pins = new Set<Pin>()
  readonly #floors = new Map<string, number>()
  readonly #now: () => number

  constructor(now: () => number = Date.now) {
    this.#now = now
  }

  /** @throws CdpError NOT_FOUND if a promotion beyond `seq` has begun */
  pin(vmDirectory: string, seq: number, reason: string): Pin {
    const floor = this.#floors.get(vmDirectory)
    if (floor !== undefined && seq < floor) throw leftHistory(vmDirectory.split('/').at(-1) ?? vmDirectory, seq, floor)
    const pin: Pin = { vmDirectory, seq, reason, sinceUnixMs: this.#now(), release: () => void this.#pins.delete(pin) }
    this.#pins.add(pin)
    return pin
  }

  /**
   * A promotion of several VMs begins: nothing below these sequences may be pinned from now on. All or nothing.
   * @returns the pins that stand in its way; none if it may begin
   */
  reserve(targets: ReadonlyMap<string, number>): PinInfo[] {
    const inTheWay = this.list().filter(({ vmDirectory, seq }) => seq < (targets.get(vmDirectory) ?? 0))
    if (inTheWay.length > 0) return inTheWay
    for (const [vmDirectory, seq] of targets) this.#floors.set(vmDirectory, Math.max(seq, this.#floors.get(vmDirectory) ?? 0))
    return []
  }

  /** A promotion that was reserved did not begin after all: its intent is in no file. */
  withdraw(vmDirectory: string, recoverableFromSeq: number): void {
    this.#floors.set(vmDirectory, recoverableFromSeq)
  }

  /** The VM's replica is gone: one that comes in its directory counts from the start. */
  forget(vmDirectory: string): void {
    this.#floors.delete(vmDirectory)
  }

  /** The lowest pinned sequence of a VM: its base must not go beyond. */
  lowest(vmDirectory: string): number | undefined {
    let lowest: number | undefined
    for (const pin of this.#pins) if (pin.vmDirectory === vmDirectory && (lowest === undefined || pin.seq < lowest)) lowest = pin.seq
    return lowest
  }

  list(): PinInfo[] {
    return [...this.#pins].map(({ vmDirectory, seq, reason, sinceUnixMs }) => ({ vmDirectory, seq, reason, sinceUnixMs }))
  }
}
