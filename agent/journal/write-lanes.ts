/** Writes under way at once, a few at a time. The first error is kept for who waits next; none goes unhandled. */
export class WriteLanes {
  #writing: Promise<void>[] = []
  #failure: { error: unknown } | undefined

  /** Resolves when another one may begin. @throws what a write threw */
  async add(write: Promise<void>, lanes: number): Promise<void> {
    this.#writing.push(write.catch((error: unknown) => void (this.#failure ??= { error })))
    if (this.#writing.length >= lanes) await this.drain()
  }

  /** Resolves when none is under way. @throws what a write threw */
  async drain(): Promise<void> {
    await this.settle()
    if (this.#failure !== undefined) throw this.#failure.error
  }

  /** As `drain`, whatever the writes threw. */
  async settle(): Promise<void> {
    await Promise.all(this.#writing.splice(0))
  }
}
