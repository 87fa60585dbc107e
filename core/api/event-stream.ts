import type { ServerResponse } from 'node:http'
import type { Logger } from '../log/index.ts'
import type { ApiEvent, EventLog } from './event-log.ts'

const maxFollowers = 32
const maxQueuedBytes = 256 * 1024
/** An empty line this often, so that both ends notice a dead connection. */
const keepAliveMs = 15_000

/** Serves an EventLog as lines of JSON. A reader that lets more than 256 KiB pile up is dropped: events never wait for anybody. */
export class EventStreams {
  readonly #events: EventLog
  readonly #log: Logger
  readonly #open = new Map<ServerResponse, () => void>()
  #dropped = 0

  constructor(events: EventLog, log: Logger) {
    this.#events = events
    this.#log = log
  }

  get dropped(): number {
    return this.#dropped
  }

  get full(): boolean {
    return this.#open.size >= maxFollowers
  }

  serve(response: ServerResponse, options: { follow: boolean; limit: number }): void {
    response.writeHead(200, { 'content-type': 'application/x-ndjson', 'cache-control': 'no-store' })
    const backlog = this.#events.recent(options.limit).map(lineOf).join('')
    if (!options.follow) {
      response.end(backlog)
      return
    }
    const send = (line: string): void => {
      if (response.writableLength + line.length > maxQueuedBytes) {
        this.#dropped += 1
        this.#log.warn('event reader dropped: it reads too slowly', { queuedBytes: response.writableLength })
        finish()
        response.destroy()
      } else response.write(line)
    }
    const unfollow = this.#events.follow((event) => send(lineOf(event)))
    const keepAlive = setInterval(() => send('\n'), keepAliveMs)
    keepAlive.unref()
    const finish = (): void => {
      clearInterval(keepAlive)
      unfollow()
      this.#open.delete(response)
    }
    this.#open.set(response, finish)
    response.on('error', (error) => this.#log.debug('event reader broke', { error })).once('close', finish)
    response.flushHeaders()
    if (backlog !== '') response.write(backlog)
  }

  /** Ends every stream. */
  close(): void {
    for (const [response, finish] of [...this.#open]) {
      finish()
      response.end()
    }
  }
}

const lineOf = (event: ApiEvent): string => `${JSON.stringify(event)}\n`
