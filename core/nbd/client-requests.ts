import { CdpError } from '../errors/index.ts'
import type { ClientSession } from './client-handshake.ts'
import { NBD_CMD_BLOCK_STATUS, NBD_CMD_READ } from './constants.ts'
import type { Extent } from './export.ts'
import { requestRefused } from './nbd-errno.ts'
import type { ReplySink } from './reply-parser.ts'

/** A part of a disk. */
export type ByteRange = { offsetBytes: number; lengthBytes: number }

/** One request under way. */
export type PendingRequest = {
  readonly type: number
  /** For messages. */
  readonly command: string
  readonly offsetBytes: number
  readonly lengthBytes: number
  /** Where the data of a READ go; dropped when the caller gave up. */
  target: Buffer | undefined
  readonly targetOffsetBytes: number
  readonly holes: ByteRange[]
  readonly statuses: Map<string, Extent[]>
  resolve(request: PendingRequest): void
  reject(error: CdpError): void
}

type Slot = { generation: number; pending: PendingRequest | undefined; received: ByteRange[]; refusal: CdpError | undefined }
type Waiter = { resolve(slot: number): void; reject(error: CdpError): void }

/** Callers that may wait for a slot; more is a caller without a bound of its own. */
const MAX_WAITERS = 65_536

/** Parts of one read that do not follow on each other; servers send in order, and each part is compared with these. */
const MAX_SCATTERED_PARTS = 1024

/**
 * The requests under way on one connection: a bounded number of slots, and the replies matched to them. A cookie is (generation of the slot, slot),
 * so a reply that comes twice or was never asked for is seen. Throws CdpError NBD_PROTOCOL into the parser for replies that make no sense.
 */
export class RequestTable implements ReplySink {
  readonly #session: ClientSession
  readonly #slots: Slot[]
  readonly #free: number[]
  readonly #waiters: Waiter[] = []
  #failure: CdpError | undefined
  // The data that are arriving: whose they are and where the next byte belongs.
  #payloadOwner: PendingRequest | undefined
  #payloadAtBytes = 0

  constructor(session: ClientSession, maxRequestsInFlight: number) {
    this.#session = session
    this.#slots = Array.from({ length: maxRequestsInFlight }, () => ({ generation: 0, pending: undefined, received: [], refusal: undefined }))
    this.#free = Array.from({ length: maxRequestsInFlight }, (_, index) => maxRequestsInFlight - 1 - index)
  }

  /** A slot of one's own, in the order of asking. @throws CdpError CLOSED, ABORTED, CONFLICT (too many callers wait) */
  async acquire(signal?: AbortSignal): Promise<number> {
    if (this.#failure) throw this.#failure
    const slot = this.#free.pop()
    if (slot !== undefined) return slot
    if (this.#waiters.length >= MAX_WAITERS) throw new CdpError('CONFLICT', 'Too many NBD requests wait for this connection.')
    const { promise, resolve, reject } = Promise.withResolvers<number>()
    const waiter = { resolve, reject }
    this.#waiters.push(waiter)
    const onAbort = (): void => {
      const index = this.#waiters.indexOf(waiter)
      if (index < 0) return
      this.#waiters.splice(index, 1)
      reject(aborted(signal))
    }
    signal?.addEventListener('abort', onAbort, { once: true })
    try {
      return await promise
    } finally {
      signal?.removeEventListener('abort', onAbort)
    }
  }

  /** Gives back a slot that was acquired and not used. */
  release(slot: number): void {
    const waiter = this.#waiters.shift()
    if (waiter) waiter.resolve(slot)
    else this.#free.push(slot)
  }

  /** Puts a request into an acquired slot. @returns the upper half of its cookie; the lower half is the slot. @throws CdpError once failed */
  begin(slot: number, pending: PendingRequest): number {
    if (this.#failure) throw this.#failure
    const entry = this.#slotAt(slot)
    entry.generation = (entry.generation + 1) >>> 0
    entry.pending = pending
    entry.received = []
    entry.refusal = undefined
    return entry.generation
  }

  /** Rejects all that is under way or waits, and all that comes later. */
  failAll(error: CdpError): void {
    this.#failure ??= error
    this.#payloadOwner = undefined
    for (const waiter of this.#waiters.splice(0)) waiter.reject(error)
    for (const entry of this.#slots) {
      const { pending } = entry
      entry.pending = undefined
      if (!pending) continue
      pending.target = undefined
      pending.reject(error)
    }
  }

  onSimpleReply(error: number, cookieHigh: number, cookieLow: number): number {
    const { entry, pending } = this.#find(cookieHigh, cookieLow)
    if (error !== 0) {
      entry.refusal ??= requestRefused(pending.command, error, '')
      return 0
    }
    if (pending.type === NBD_CMD_BLOCK_STATUS) throw protocolError('The server answers block status with a simple reply.')
    if (pending.type !== NBD_CMD_READ) return 0
    if (this.#session.structuredReplies) throw protocolError('The server answers a read with a simple reply in spite of structured replies.')
    this.onData(cookieHigh, cookieLow, pending.offsetBytes, pending.lengthBytes)
    return pending.lengthBytes
  }

  onData(cookieHigh: number, cookieLow: number, offsetBytes: number, lengthBytes: number): void {
    this.#payloadOwner = this.#receive(cookieHigh, cookieLow, offsetBytes, lengthBytes)
    this.#payloadAtBytes = this.#payloadOwner.targetOffsetBytes + offsetBytes - this.#payloadOwner.offsetBytes
  }

  onPayload(chunk: Buffer, start: number, end: number): void {
    const target = this.#payloadOwner?.target
    if (target) chunk.copy(target, this.#payloadAtBytes, start, end)
    this.#payloadAtBytes += end - start
  }

  onHole(cookieHigh: number, cookieLow: number, offsetBytes: number, lengthBytes: number): void {
    const pending = this.#receive(cookieHigh, cookieLow, offsetBytes, lengthBytes)
    const at = pending.targetOffsetBytes + offsetBytes - pending.offsetBytes
    pending.target?.fill(0, at, at + lengthBytes)
    pending.holes.push({ offsetBytes, lengthBytes })
  }

  onBlockStatus(cookieHigh: number, cookieLow: number, contextId: number, extents: Extent[]): void {
    const { pending } = this.#find(cookieHigh, cookieLow)
    const context = this.#session.metaContexts.get(contextId)
    if (pending.type !== NBD_CMD_BLOCK_STATUS || context === undefined) throw protocolError('The server sends a block status nobody asked for.')
    if (pending.statuses.has(context)) throw protocolError('The server sends the block status of a context twice.')
    if (extents.some((extent) => extent.lengthBytes === 0)) throw protocolError('The server sends an empty extent.')
    pending.statuses.set(context, extents)
  }

  onError(cookieHigh: number, cookieLow: number, error: number, message: string): void {
    const { entry, pending } = this.#find(cookieHigh, cookieLow)
    if (error === 0) throw protocolError('The server sends an error chunk without an error.')
    entry.refusal ??= requestRefused(pending.command, error, message)
  }

  onReplyEnd(cookieHigh: number, cookieLow: number): void {
    const { entry, pending } = this.#find(cookieHigh, cookieLow)
    this.#payloadOwner = undefined
    if (!entry.refusal) {
      if (pending.type === NBD_CMD_READ && !coversAll(entry.received, pending)) throw protocolError('The server did not send all data of a read.')
      if (pending.type === NBD_CMD_BLOCK_STATUS && pending.statuses.size < this.#session.metaContexts.size) {
        throw protocolError('The server left out a metadata context.')
      }
    }
    entry.pending = undefined
    if (entry.refusal) pending.reject(entry.refusal)
    else pending.resolve(pending)
    this.release(cookieLow)
  }

  /** Notes a received part of a READ after checking that it belongs there. */
  #receive(cookieHigh: number, cookieLow: number, offsetBytes: number, lengthBytes: number): PendingRequest {
    const { entry, pending } = this.#find(cookieHigh, cookieLow)
    const endBytes = offsetBytes + lengthBytes
    if (pending.type !== NBD_CMD_READ || offsetBytes < pending.offsetBytes || endBytes > pending.offsetBytes + pending.lengthBytes || lengthBytes === 0) {
      throw protocolError('The server sends data nobody asked for.')
    }
    if (entry.received.some((range) => offsetBytes < range.offsetBytes + range.lengthBytes && range.offsetBytes < endBytes)) {
      throw protocolError('The server sends the same data twice.')
    }
    const last = entry.received.at(-1)
    if (last && last.offsetBytes + last.lengthBytes === offsetBytes) last.lengthBytes += lengthBytes
    else entry.received.push({ offsetBytes, lengthBytes })
    if (entry.received.length > MAX_SCATTERED_PARTS) throw protocolError('The server sends a read in too many scattered parts.')
    return pending
  }

  #find(cookieHigh: number, cookieLow: number): { entry: Slot; pending: PendingRequest } {
    const entry = cookieLow < this.#slots.length ? this.#slotAt(cookieLow) : undefined
    if (!entry?.pending || entry.generation !== cookieHigh) throw protocolError('The server answers a request that is not under way.')
    return { entry, pending: entry.pending }
  }

  #slotAt(slot: number): Slot {
    const entry = this.#slots[slot]
    if (!entry) throw new CdpError('INTERNAL', 'No such NBD request slot.', { context: { slot } })
    return entry
  }
}

/** Parts do not overlap (checked on arrival), so their sum decides. */
const coversAll = (received: readonly ByteRange[], pending: PendingRequest): boolean =>
  received.reduce((sum, range) => sum + range.lengthBytes, 0) === pending.lengthBytes

const protocolError = (message: string): CdpError => new CdpError('NBD_PROTOCOL', message)

export const aborted = (signal: AbortSignal | undefined): CdpError => new CdpError('ABORTED', 'The NBD request was given up.', { cause: signal?.reason })
