/** A part of a range, in bytes. */
export type Span = { offsetBytes: number; lengthBytes: number }

type Read = { disk: number; startBytes: number; endBytes: number; /** What is left, sorted, as start, end pairs. */ spans: { start: number; end: number }[] }

/**
 * The race of sync reads against live writes (semantics.md, Sync). A read is registered before it is sent; every write, zero or discard that
 * is parsed before its reply becomes a record cuts its range out of it. What is left at the end is older than nothing in the journal.
 */
export class RaceGuard {
  readonly #reads = new Set<Read>()

  /** True while any read is under way; lets the guest's path skip `cut`. */
  get busy(): boolean {
    return this.#reads.size > 0
  }

  /** Registers a read that is about to be sent. `take` ends it and returns what may become records. */
  register(disk: number, offsetBytes: number, lengthBytes: number): { take(): Span[] } {
    const read: Read = { disk, startBytes: offsetBytes, endBytes: offsetBytes + lengthBytes, spans: [{ start: offsetBytes, end: offsetBytes + lengthBytes }] }
    this.#reads.add(read)
    return {
      take: () => {
        this.#reads.delete(read)
        return read.spans.map(({ start, end }) => ({ offsetBytes: start, lengthBytes: end - start }))
      },
    }
  }

  /** A live operation on the range was parsed. */
  cut(disk: number, offsetBytes: number, lengthBytes: number): void {
    const endBytes = offsetBytes + lengthBytes
    for (const read of this.#reads) {
      if (read.disk !== disk || read.endBytes <= offsetBytes || read.startBytes >= endBytes) continue
      read.spans = read.spans.flatMap((span) => {
        if (span.end <= offsetBytes || span.start >= endBytes) return [span]
        const left = []
        if (span.start < offsetBytes) left.push({ start: span.start, end: offsetBytes })
        if (span.end > endBytes) left.push({ start: endBytes, end: span.end })
        return left
      })
    }
  }

  clear(): void {
    this.#reads.clear()
  }
}
