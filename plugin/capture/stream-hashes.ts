import { errorCode } from '../../core/errors/index.ts'
import type { ExtentHashes, HashRequest } from '../../core/stream/index.ts'
import type { StreamLink } from '../replicate/index.ts'
import type { HashSource } from '../sync/index.ts'

/** What the agent holds, asked over a session's stream; while the link is down a question waits for it to come back. */
export class StreamHashes implements HashSource {
  readonly #link: StreamLink
  readonly #until: (until: () => boolean) => Promise<void>

  constructor(link: StreamLink, until: (until: () => boolean) => Promise<void>) {
    this.#link = link
    this.#until = until
  }

  asOfSeq(): number {
    return this.#link.durableSeq
  }

  async ask(question: Omit<HashRequest, 'requestId'>, signal: AbortSignal): Promise<ExtentHashes> {
    for (;;) {
      await this.#until(() => this.#link.up || signal.aborted)
      signal.throwIfAborted()
      try {
        return await orAborted(this.#link.askHashes(question), signal)
      } catch (error) {
        signal.throwIfAborted()
        if (errorCode(error) !== 'CLOSED') throw error
        // The stream is gone, or going: what was asked is asked again on the next one.
        await new Promise((resolve) => setImmediate(resolve))
      }
    }
  }
}

/** The agent may take its time with an answer that nobody wants any more. */
const orAborted = async <T>(answer: Promise<T>, signal: AbortSignal): Promise<T> => {
  const { promise: aborted, reject } = Promise.withResolvers<never>()
  const end = (): void => reject(signal.reason as Error)
  signal.addEventListener('abort', end, { once: true })
  try {
    return await Promise.race([answer, aborted])
  } finally {
    signal.removeEventListener('abort', end)
  }
}
