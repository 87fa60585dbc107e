import { CdpError } from '../../core/errors/index.ts'
import { MAX_HASH_REQUESTS } from '../../core/stream/index.ts'
import type { ExtentHashes, HashReply, HashRequest } from '../../core/stream/index.ts'

/** Half of what the agent takes: those of a connection that was lost may still be on their way when the next one begins. */
const MAX_IN_FLIGHT = MAX_HASH_REQUESTS / 2
const DEADLINE_MS = 120_000
const isCode = (code: string): code is 'NOT_FOUND' | 'JOURNAL_DAMAGED' | 'BAD_INPUT' => code === 'NOT_FOUND' || code === 'JOURNAL_DAMAGED' || code === 'BAD_INPUT'

type Asked = { request: HashRequest; resolve: (answer: ExtentHashes) => void; reject: (error: CdpError) => void; timer: NodeJS.Timeout }

/** Hash requests of a stream and the replies to them: bounded in flight, each with a deadline, all of them asked again by nobody but the caller. No I/O. */
export class HashQuestions {
  readonly #send: (request: HashRequest) => void
  readonly #asked = new Map<number, Asked>()
  readonly #waiting: (() => void)[] = []
  #nextId = 1

  /** @param send throws if there is no connection to send it on */
  constructor(send: (request: HashRequest) => void) {
    this.#send = send
  }

  /** @throws CdpError CLOSED if the connection is lost meanwhile, TIMEOUT, NOT_FOUND, JOURNAL_DAMAGED, BAD_INPUT, IO */
  async ask(question: Omit<HashRequest, 'requestId'>): Promise<ExtentHashes> {
    while (this.#asked.size >= MAX_IN_FLIGHT) await new Promise<void>((resolve) => this.#waiting.push(resolve))
    const request = { ...question, requestId: this.#nextId }
    this.#nextId = (this.#nextId % 0xffff_ffff) + 1
    try {
      return await new Promise<ExtentHashes>((resolve, reject) => {
        const timer = setTimeout(() => reject(new CdpError('TIMEOUT', 'the agent did not say what it holds in time', { retry: true })), DEADLINE_MS)
        this.#asked.set(request.requestId, { request, resolve, reject, timer })
        this.#send(request)
      })
    } finally {
      clearTimeout(this.#asked.get(request.requestId)?.timer)
      this.#asked.delete(request.requestId)
      this.#waiting.shift()?.()
    }
  }

  /** @throws CdpError STREAM_PROTOCOL for an answer to another number of extents; a reply that nobody waits for any more is let be */
  take(reply: HashReply): void {
    const asked = this.#asked.get(reply.requestId)
    if (asked === undefined) return
    if ('error' in reply) {
      const { code, message } = reply.error
      asked.reject(new CdpError(isCode(code) ? code : 'IO', message, { retry: true }))
      return
    }
    if (reply.marks.length !== asked.request.extentCount) throw new CdpError('STREAM_PROTOCOL', 'the agent answered for other extents than it was asked for')
    asked.resolve(reply)
  }

  /** The connection is gone: nothing that was asked is answered any more. */
  drop(why: string): void {
    for (const { reject } of this.#asked.values()) reject(new CdpError('CLOSED', why, { retry: true }))
  }
}
