/** What a pin is for, by the VM's directory (VM ids repeat between sites); shown to the operator who asks why promotion waits. */
export type PinInfo = { vmDirectory: string; seq: number; reason: string; sinceUnixMs: number }

/** Held while something reads the base at `seq`; releasing twice is harmless. */
export type Pin = PinInfo & { release(): void }

/**
 * Which sequences of which VMs are being read: promotion moves a VM's base up to `lowest(vmDirectory)` and no further. Kept in memory:
 * whoever needs a pin over a restart asks for it again before promotion begins.
 */
export class PinRegistry {
  readonly #pins = new Set<Pin>()
  readonly #now: () => number

  constructor(now: () => number = Date.now) {
    this.#now = now
  }

  pin(vmDirectory: string, seq: number, reason: string): Pin {
    const pin: Pin = { vmDirectory, seq, reason, sinceUnixMs: this.#now(), release: () => void this.#pins.delete(pin) }
    this.#pins.add(pin)
    return pin
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
