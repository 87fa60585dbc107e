import { CdpError } from '../errors/index.ts'
import { ClientConnection } from './client-connection.ts'
import { aborted, type ByteRange, type PendingRequest } from './client-requests.ts'
import * as nbd from './constants.ts'
import { describeAddress, type BlockSize, type Extent, type NbdAddress } from './export.ts'

export type NbdClientOptions = {
  exportName: string
  /** Contexts to negotiate, for example base:allocation; see NbdClient.metaContexts for what the server has. */
  metaContexts?: readonly string[]
  /** Time for connecting and the handshake. Default 10 s. */
  deadlineMs?: number
  /** Requests under way at once; further callers wait in line. Default 16. */
  maxRequestsInFlight?: number
  /** False to stay with simple replies. Default true. */
  structuredReplies?: boolean
  signal?: AbortSignal
}

/** Longest range of a request that carries no data (trim, write zeroes, block status). */
const MAX_RANGE_BYTES = 1024 * 1024 * 1024

const COMMAND_NAMES: Readonly<Record<number, string>> = {
  [nbd.NBD_CMD_READ]: 'read',
  [nbd.NBD_CMD_WRITE]: 'write',
  [nbd.NBD_CMD_FLUSH]: 'flush',
  [nbd.NBD_CMD_TRIM]: 'trim',
  [nbd.NBD_CMD_WRITE_ZEROES]: 'write zeroes',
  [nbd.NBD_CMD_BLOCK_STATUS]: 'block status',
}

const NO_TARGET = Buffer.alloc(0)

/**
 * An NBD client on one connection. Operations may overlap; long ones are cut to what the server takes. They reject with CdpError: BAD_INPUT (range
 * outside the export or not aligned), NBD_REFUSED (the server said no), CLOSED (connection gone), ABORTED (signal; a write may or may not be done),
 * NBD_PROTOCOL. Nothing is retried and nothing reconnects.
 */
export class NbdClient {
  readonly sizeBytes: number
  readonly readOnly: boolean
  readonly blockSize: BlockSize
  /** Names the server agreed to. */
  readonly metaContexts: readonly string[]
  readonly canMultiConn: boolean
  readonly structuredReplies: boolean
  /** Resolves when the connection is gone, for any reason. */
  readonly closed: Promise<void>
  readonly #connection: ClientConnection
  readonly #transmissionFlags: number

  private constructor(connection: ClientConnection) {
    const { session } = connection
    this.#connection = connection
    this.#transmissionFlags = session.transmissionFlags
    this.sizeBytes = session.sizeBytes
    this.readOnly = (session.transmissionFlags & nbd.NBD_FLAG_READ_ONLY) !== 0
    this.canMultiConn = (session.transmissionFlags & nbd.NBD_FLAG_CAN_MULTI_CONN) !== 0
    this.blockSize = session.blockSize
    this.metaContexts = [...session.metaContexts.values()]
    this.structuredReplies = session.structuredReplies
    this.closed = connection.closed
  }

  /** @throws CdpError UNREACHABLE (nobody listens), TIMEOUT, ABORTED, NBD_REFUSED (no such export), NBD_PROTOCOL, CLOSED */
  static async connect(address: NbdAddress, options: NbdClientOptions): Promise<NbdClient> {
    return new NbdClient(await ClientConnection.open(address, { deadlineMs: 10_000, maxRequestsInFlight: 16, ...options }))
  }

  async read(offsetBytes: number, lengthBytes: number, signal?: AbortSignal): Promise<Buffer> {
    this.#checkRange(offsetBytes, lengthBytes)
    const target = Buffer.allocUnsafe(lengthBytes)
    await this.readInto(target, 0, offsetBytes, lengthBytes, signal)
    return target
  }

  /**
   * Reads into target[targetOffsetBytes ..]. After a rejection the content of that part is undefined, but nothing writes there any more.
   * @returns the ranges (of the export) that the server sent as holes, ascending; they are zeroed in target
   */
  async readInto(target: Buffer, targetOffsetBytes: number, offsetBytes: number, lengthBytes: number, signal?: AbortSignal): Promise<readonly ByteRange[]> {
    this.#checkRange(offsetBytes, lengthBytes)
    if (targetOffsetBytes < 0 || targetOffsetBytes + lengthBytes > target.length) throw new CdpError('BAD_INPUT', 'The range does not fit into the buffer.')
    const done = await this.#inPieces(offsetBytes, lengthBytes, this.blockSize.maxBytes, (atBytes, pieceBytes) =>
      this.#submit(nbd.NBD_CMD_READ, 0, atBytes, pieceBytes, signal, { target, targetOffsetBytes: targetOffsetBytes + atBytes - offsetBytes }),
    )
    return done.flatMap((piece) => piece.holes).sort((a, b) => a.offsetBytes - b.offsetBytes)
  }

  /**
   * Status of the whole range for each negotiated context, asked for as often as it takes; neighbours with the same flags are one extent.
   * Memory grows with the number of extents: ask for a large disk in parts. @throws CdpError BAD_INPUT when no context was negotiated
   */
  async blockStatus(offsetBytes: number, lengthBytes: number, signal?: AbortSignal): Promise<Map<string, Extent[]>> {
    this.#checkRange(offsetBytes, lengthBytes)
    if (this.metaContexts.length === 0) throw new CdpError('BAD_INPUT', 'No metadata context was negotiated with the NBD server.')
    const result = new Map<string, Extent[]>(this.metaContexts.map((context) => [context, []]))
    const endBytes = offsetBytes + lengthBytes
    let atBytes = offsetBytes
    while (atBytes < endBytes) {
      const askedBytes = Math.min(endBytes - atBytes, MAX_RANGE_BYTES)
      const { statuses } = await this.#submit(nbd.NBD_CMD_BLOCK_STATUS, 0, atBytes, askedBytes, signal)
      // Contexts may describe ranges of different length: go on where the shortest ends.
      const coveredBytes = Math.min(askedBytes, ...Array.from(statuses.values(), (extents) => extents.reduce((sum, extent) => sum + extent.lengthBytes, 0)))
      for (const [context, extents] of statuses) appendExtents(result.get(context) ?? [], extents, coveredBytes)
      atBytes += coveredBytes
    }
    return result
  }

  /** `data` must not change until this settles. */
  async write(offsetBytes: number, data: Uint8Array, how: { fua?: boolean; signal?: AbortSignal } = {}): Promise<void> {
    this.#checkRange(offsetBytes, data.length)
    this.#checkWritable(how.fua)
    await this.#inPieces(offsetBytes, data.length, this.blockSize.maxBytes, (atBytes, pieceBytes) =>
      this.#submit(nbd.NBD_CMD_WRITE, how.fua ? nbd.NBD_CMD_FLAG_FUA : 0, atBytes, pieceBytes, how.signal, {
        data: data.subarray(atBytes - offsetBytes, atBytes - offsetBytes + pieceBytes),
      }),
    )
  }

  /** `mayTrim` false keeps the range allocated; default true. `fast`: NBD_REFUSED instead of a slow write. */
  async writeZeroes(
    offsetBytes: number, lengthBytes: number, how: { mayTrim?: boolean; fua?: boolean; fast?: boolean; signal?: AbortSignal } = {},
  ): Promise<void> {
    this.#checkRange(offsetBytes, lengthBytes)
    this.#checkWritable(how.fua)
    this.#checkOffered(nbd.NBD_FLAG_SEND_WRITE_ZEROES, 'write zeroes')
    if (how.fast) this.#checkOffered(nbd.NBD_FLAG_SEND_FAST_ZERO, 'fast zeroes')
    const flags =
      (how.fua ? nbd.NBD_CMD_FLAG_FUA : 0) | (how.mayTrim === false ? nbd.NBD_CMD_FLAG_NO_HOLE : 0) | (how.fast ? nbd.NBD_CMD_FLAG_FAST_ZERO : 0)
    await this.#inPieces(offsetBytes, lengthBytes, MAX_RANGE_BYTES, (atBytes, pieceBytes) =>
      this.#submit(nbd.NBD_CMD_WRITE_ZEROES, flags, atBytes, pieceBytes, how.signal),
    )
  }

  async trim(offsetBytes: number, lengthBytes: number, how: { fua?: boolean; signal?: AbortSignal } = {}): Promise<void> {
    this.#checkRange(offsetBytes, lengthBytes)
    this.#checkWritable(how.fua)
    this.#checkOffered(nbd.NBD_FLAG_SEND_TRIM, 'trim')
    await this.#inPieces(offsetBytes, lengthBytes, MAX_RANGE_BYTES, (atBytes, pieceBytes) =>
      this.#submit(nbd.NBD_CMD_TRIM, how.fua ? nbd.NBD_CMD_FLAG_FUA : 0, atBytes, pieceBytes, how.signal),
    )
  }

  /** Everything written and acknowledged before is durable afterwards. */
  async flush(signal?: AbortSignal): Promise<void> {
    this.#checkOffered(nbd.NBD_FLAG_SEND_FLUSH, 'flush')
    await this.#submit(nbd.NBD_CMD_FLUSH, 0, 0, 0, signal)
  }

  /** Says goodbye (NBD_CMD_DISC) and closes; what is still under way is rejected with CLOSED. Idempotent. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#connection.disconnect()
  }

  async #submit(
    type: number, flags: number, offsetBytes: number, lengthBytes: number, signal?: AbortSignal,
    bytes: { data?: Uint8Array; target?: Buffer; targetOffsetBytes?: number } = {},
  ): Promise<PendingRequest> {
    if (signal?.aborted) throw aborted(signal)
    const { table } = this.#connection
    const slot = await table.acquire(signal)
    if (signal?.aborted) {
      table.release(slot)
      throw aborted(signal)
    }
    const { promise, resolve, reject } = Promise.withResolvers<PendingRequest>()
    const pending: PendingRequest = {
      type, command: COMMAND_NAMES[type] ?? String(type), offsetBytes, lengthBytes,
      target: bytes.target ?? NO_TARGET, targetOffsetBytes: bytes.targetOffsetBytes ?? 0, holes: [], statuses: new Map(), resolve, reject,
    }
    const onAbort = (): void => {
      // The reply still comes and frees the slot then; its data go nowhere.
      pending.target = undefined
      reject(aborted(signal))
    }
    signal?.addEventListener('abort', onAbort, { once: true })
    try {
      this.#connection.send(type, flags, table.begin(slot, pending), slot, offsetBytes, lengthBytes, bytes.data)
      return await promise
    } finally {
      signal?.removeEventListener('abort', onAbort)
    }
  }

  /** Runs `submit` for each part of a range; waits for all of them even when one fails, so that nothing is under way afterwards. */
  async #inPieces(
    offsetBytes: number, lengthBytes: number, maxPieceBytes: number, submit: (atBytes: number, pieceBytes: number) => Promise<PendingRequest>,
  ): Promise<readonly PendingRequest[]> {
    if (lengthBytes === 0) return []
    if (lengthBytes <= maxPieceBytes) return [await submit(offsetBytes, lengthBytes)]
    const running: Promise<PendingRequest>[] = []
    const endBytes = offsetBytes + lengthBytes
    for (let atBytes = offsetBytes; atBytes < endBytes; atBytes += maxPieceBytes) running.push(submit(atBytes, Math.min(maxPieceBytes, endBytes - atBytes)))
    const settled = await Promise.allSettled(running)
    return settled.map((piece) => {
      if (piece.status === 'rejected') throw piece.reason
      return piece.value
    })
  }

  #checkRange(offsetBytes: number, lengthBytes: number): void {
    const context = { offsetBytes, lengthBytes, sizeBytes: this.sizeBytes }
    const valid = Number.isSafeInteger(offsetBytes) && Number.isSafeInteger(lengthBytes) && offsetBytes >= 0 && lengthBytes >= 0
    if (!valid || offsetBytes + lengthBytes > this.sizeBytes) {
      throw new CdpError('BAD_INPUT', 'The range is outside the NBD export.', { context })
    }
    const { minBytes } = this.blockSize
    if (offsetBytes % minBytes !== 0 || lengthBytes % minBytes !== 0) {
      throw new CdpError('BAD_INPUT', `The range is not aligned to ${minBytes} bytes, the least the NBD server takes.`, { context })
    }
  }

  #checkWritable(fua = false): void {
    if (this.readOnly) throw new CdpError('NBD_REFUSED', 'The NBD export is read-only.')
    if (fua) this.#checkOffered(nbd.NBD_FLAG_SEND_FUA, 'FUA')
  }

  #checkOffered(flag: number, what: string): void {
    if ((this.#transmissionFlags & flag) === 0) throw new CdpError('NBD_REFUSED', `The NBD server does not offer ${what}.`)
  }
}

/**
 * Full handshake and a clean disconnect, all within deadlineMs from now: whether a server really answers for this export.
 * @throws CdpError as NbdClient.connect; TIMEOUT also for a server that does not close after NBD_CMD_DISC
 */
export const checkHandshake = async (address: NbdAddress, exportName: string, deadlineMs: number): Promise<void> => {
  const startMs = performance.now()
  const connection = await ClientConnection.open(address, { exportName, deadlineMs, maxRequestsInFlight: 1 })
  const leftMs = deadlineMs - (performance.now() - startMs)
  if (!(await connection.disconnect(Math.max(1, leftMs)))) {
    throw new CdpError('TIMEOUT', `The NBD server ${describeAddress(address)} did not close after the client said goodbye.`, { retry: true })
  }
}

/** Appends `extents`, cut off at coveredBytes, merging neighbours with equal flags. */
const appendExtents = (into: Extent[], extents: readonly Extent[], coveredBytes: number): void => {
  let leftBytes = coveredBytes
  for (const { lengthBytes, flags } of extents) {
    const takenBytes = Math.min(lengthBytes, leftBytes)
    if (takenBytes === 0) return
    leftBytes -= takenBytes
    const last = into.at(-1)
    if (last && last.flags === flags) last.lengthBytes += takenBytes
    else into.push({ lengthBytes: takenBytes, flags })
  }
}
