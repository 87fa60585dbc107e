/**
 * What the capture target saw of QEMU's connections in one incremental round. QEMU itself does not know whether its copies arrived: it
 * counts a write as done if only its sink took it (docs/decisions/incremental-rounds.md). Pure.
 */
export class RoundLedger {
  #open = new Map<string, number>()
  #seen = new Set<string>()
  #broken: string | undefined
  #on = false

  get isOn(): boolean {
    return this.#on
  }

  /** From here on connections belong to this round. */
  begin(): void {
    this.#open = new Map()
    this.#seen = new Set()
    this.#broken = undefined
    this.#on = true
  }

  end(): void {
    this.#on = false
  }

  opened(key: string): void {
    this.#seen.add(key)
    this.#open.set(key, (this.#open.get(key) ?? 0) + 1)
  }

  /** `clean`: QEMU said goodbye, and every request of that connection was done. */
  closed(key: string, clean: boolean, why: string): void {
    this.#open.set(key, (this.#open.get(key) ?? 0) - 1)
    if (!clean) this.#broken ??= `${key}: ${why}`
  }

  /** Why not everything of a round over these disks has arrived; undefined: it has. */
  missing(keys: readonly string[]): string | undefined {
    if (!this.#on) return 'no round is under way'
    if (this.#broken !== undefined) return this.#broken
    const unseen = keys.find((key) => !this.#seen.has(key))
    if (unseen !== undefined) return `${unseen}: QEMU was never connected`
    const open = keys.find((key) => (this.#open.get(key) ?? 0) > 0)
    return open === undefined ? undefined : `${open}: QEMU is still connected`
  }
}
