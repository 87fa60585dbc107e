import type { LogLevel } from '../log/index.ts'

/** One thing that happened, for people and scripts. `seq` is gap-free within one run of a daemon: a gap in a stream means dropped events. */
export type ApiEvent = {
  seq: number
  atUnixMs: number
  level: Exclude<LogLevel, 'debug' | 'trace'>
  /** Stable, dotted: "checkpoint.valid", "capture.lost". */
  kind: string
  message: string
  context: Record<string, string | number | boolean>
}

export type EventInput = Omit<ApiEvent, 'seq' | 'atUnixMs' | 'context'> & { context?: ApiEvent['context'] }

/** The last events of a daemon, in memory and bounded: the oldest fall out. Followers are called in the turn of the append. */
export class EventLog {
  readonly #capacity: number
  readonly #nowUnixMs: () => number
  readonly #ring: ApiEvent[] = []
  readonly #followers = new Set<(event: ApiEvent) => void>()
  #nextSeq = 1

  constructor(options: { capacity?: number; nowUnixMs?: () => number } = {}) {
    this.#capacity = options.capacity ?? 1000
    this.#nowUnixMs = options.nowUnixMs ?? Date.now
  }

  append(input: EventInput): ApiEvent {
    const event: ApiEvent = {
      seq: this.#nextSeq++,
      atUnixMs: this.#nowUnixMs(),
      level: input.level,
      kind: input.kind,
      message: input.message,
      context: input.context ?? {},
    }
    if (this.#ring.length === this.#capacity) this.#ring[(event.seq - 1) % this.#capacity] = event
    else this.#ring.push(event)
    for (const follower of this.#followers) follower(event)
    return event
  }

  /** The newest `limit` events that are kept, oldest first. */
  recent(limit = this.#capacity): ApiEvent[] {
    const oldest = (this.#nextSeq - 1) % this.#capacity
    const ordered = this.#ring.length < this.#capacity ? this.#ring : [...this.#ring.slice(oldest), ...this.#ring.slice(0, oldest)]
    return limit <= 0 ? [] : ordered.slice(-limit)
  }

  /** Calls `follower` for every event from now on, until the returned function is called. A follower must not throw. */
  follow(follower: (event: ApiEvent) => void): () => void {
    this.#followers.add(follower)
    return () => this.#followers.delete(follower)
  }
}
