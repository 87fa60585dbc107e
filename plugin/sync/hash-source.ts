import type { ExtentHashes, HashRequest } from '../../core/stream/index.ts'

/** What the agent holds, as far as a comparison needs to know; the session's stream. */
export type HashSource = {
  /** A sequence of this attach that is durable at the agent. */
  asOfSeq(): number
  /**
   * @throws CdpError NOT_FOUND if the history does not hold `asOfSeq` any more: ask again as of a newer one; JOURNAL_DAMAGED if nothing of the range can be
   * read; TIMEOUT, IO, ABORTED
   */
  ask(question: Omit<HashRequest, 'requestId'>, signal: AbortSignal): Promise<ExtentHashes>
}
