type Noted = { disk: number; toBytes: number; seq: number }

/** How far a copy has come, disk by disk, as soon as that is durable at the agent: where a copy that was cut off goes on. */
export class DurableProgress {
  #noted: Noted[] = []

  /** Everything of `disk` below `toBytes` is compared or copied, and what was sent of it stands at `seq` or before. */
  note(disk: number, toBytes: number, seq: number): void {
    const last = this.#noted.at(-1)
    if (last?.disk === disk && last.toBytes >= toBytes) return
    this.#noted.push({ disk, toBytes, seq })
  }

  /** What became durable with `durableSeq`: the newest of each disk, undefined if there is nothing new. */
  take(durableSeq: number): Record<string, number> | undefined {
    if (this.#noted.length === 0 || this.#noted[0].seq > durableSeq) return undefined
    const progress: Record<string, number> = {}
    while (this.#noted.length > 0 && this.#noted[0].seq <= durableSeq) {
      const [{ disk, toBytes }] = this.#noted.splice(0, 1)
      progress[String(disk)] = toBytes
    }
    return progress
  }

  clear(): void {
    this.#noted = []
  }
}
