import { errorMessage } from '../errors/index.ts'
import * as nbd from './constants.ts'
import type { Extent, NbdExport } from './export.ts'
import { NbdRequestError, toNbdErrno } from './nbd-errno.ts'
import {
  blockStatusBytes,
  errorChunkBytes,
  NONE_CHUNK_BYTES,
  OFFSET_DATA_HEADER_BYTES,
  OFFSET_HOLE_BYTES,
  writeBlockStatus,
  writeErrorChunk,
  writeNoneChunk,
  writeOffsetDataHeader,
  writeOffsetHole,
  writeSimpleReply,
} from './reply-encoder.ts'
import type { NegotiatedSession } from './server-handshake.ts'

export type NbdRequest = {
  type: number
  flags: number
  cookieHigh: number
  cookieLow: number
  offsetBytes: number
  lengthBytes: number
  /** Payload of a WRITE that passed checkRequest. */
  data?: Buffer
}

/** Extents in one block status reply; the rest is asked for again. */
const MAX_EXTENTS = 64 * 1024
/** A read is sent sparse if it falls into no more pieces than this. */
const MAX_SPARSE_PIECES = 64

const ALLOWED_FLAGS: Readonly<Record<number, number>> = {
  [nbd.NBD_CMD_READ]: nbd.NBD_CMD_FLAG_FUA | nbd.NBD_CMD_FLAG_DF,
  [nbd.NBD_CMD_WRITE]: nbd.NBD_CMD_FLAG_FUA,
  [nbd.NBD_CMD_FLUSH]: nbd.NBD_CMD_FLAG_FUA,
  [nbd.NBD_CMD_TRIM]: nbd.NBD_CMD_FLAG_FUA,
  [nbd.NBD_CMD_WRITE_ZEROES]: nbd.NBD_CMD_FLAG_FUA | nbd.NBD_CMD_FLAG_NO_HOLE | nbd.NBD_CMD_FLAG_FAST_ZERO,
  [nbd.NBD_CMD_BLOCK_STATUS]: nbd.NBD_CMD_FLAG_FUA | nbd.NBD_CMD_FLAG_REQ_ONE,
}

/** Says before any memory is taken whether a request may run. @returns the refusal, or undefined */
export const checkRequest = (served: NbdExport, session: NegotiatedSession, request: NbdRequest): NbdRequestError | undefined => {
  const { type, flags, offsetBytes, lengthBytes } = request
  const invalid = (why: string): NbdRequestError => new NbdRequestError(nbd.NBD_EINVAL, why)
  const allowed = ALLOWED_FLAGS[type]
  if (allowed === undefined) return invalid(`unknown command ${type}`)
  if ((flags & ~allowed) !== 0) return invalid(`flags ${flags} do not go with command ${type}`)
  if ((flags & nbd.NBD_CMD_FLAG_DF) !== 0 && !session.structuredReplies) return invalid('NBD_CMD_FLAG_DF needs structured replies')
  if (type === nbd.NBD_CMD_FLUSH) {
    if (!served.flush) return invalid('flush was not offered')
    return offsetBytes === 0 && lengthBytes === 0 ? undefined : invalid('flush takes no range')
  }
  const writing = type === nbd.NBD_CMD_WRITE || type === nbd.NBD_CMD_TRIM || type === nbd.NBD_CMD_WRITE_ZEROES
  if (writing && served.readOnly) return new NbdRequestError(nbd.NBD_EPERM, 'the export is read-only')
  if (type === nbd.NBD_CMD_WRITE && !served.write) return invalid('write is not supported')
  if (type === nbd.NBD_CMD_TRIM && !served.trim) return invalid('trim was not offered')
  if (type === nbd.NBD_CMD_WRITE_ZEROES && !served.writeZeroes) return invalid('write zeroes was not offered')
  if ((flags & nbd.NBD_CMD_FLAG_FAST_ZERO) !== 0 && !served.fastZero) return invalid('fast zero was not offered')
  if (offsetBytes + lengthBytes > served.sizeBytes) {
    const errno = type === nbd.NBD_CMD_WRITE || type === nbd.NBD_CMD_WRITE_ZEROES ? nbd.NBD_ENOSPC : nbd.NBD_EINVAL
    return new NbdRequestError(errno, 'the range ends behind the end of the export')
  }
  if (offsetBytes % served.blockSize.minBytes !== 0 || lengthBytes % served.blockSize.minBytes !== 0) {
    return invalid('the range is not aligned to the minimum block size')
  }
  if ((type === nbd.NBD_CMD_READ || type === nbd.NBD_CMD_WRITE) && lengthBytes > served.blockSize.maxBytes) {
    return invalid('the range is longer than the maximum block size')
  }
  if (type === nbd.NBD_CMD_BLOCK_STATUS) {
    if (session.metaContexts.length === 0 || !served.blockStatus) return invalid('no metadata context was negotiated')
    if (lengthBytes === 0) return invalid('block status needs a length')
  }
  return undefined
}

/** What to send, in order; never empty. */
export type NbdReply = { error: boolean; send: readonly Uint8Array[] }

/** Performs a request. Never rejects: an error becomes an error reply. */
export const runRequest = async (served: NbdExport, session: NegotiatedSession, request: NbdRequest, signal: AbortSignal): Promise<NbdReply> => {
  try {
    const refusal = checkRequest(served, session, request)
    if (refusal !== undefined) throw refusal
    return { error: false, send: await perform(served, session, request, signal) }
  } catch (error) {
    return { error: true, send: [errorReply(session, request, error)] }
  }
}

const perform = async (served: NbdExport, session: NegotiatedSession, request: NbdRequest, signal: AbortSignal): Promise<readonly Uint8Array[]> => {
  const { type, flags, offsetBytes, lengthBytes } = request
  const fua = (flags & nbd.NBD_CMD_FLAG_FUA) !== 0
  if (type === nbd.NBD_CMD_READ) return performRead(served, session, request, signal)
  if (type === nbd.NBD_CMD_BLOCK_STATUS) return performBlockStatus(served, session, request)
  if (type === nbd.NBD_CMD_FLUSH) await served.flush?.()
  else if (lengthBytes === 0) return [emptyReply(request)]
  else if (type === nbd.NBD_CMD_WRITE && request.data) await served.write?.(offsetBytes, request.data, fua)
  else if (type === nbd.NBD_CMD_TRIM) await served.trim?.(offsetBytes, lengthBytes, fua)
  else if (type === nbd.NBD_CMD_WRITE_ZEROES) {
    await served.writeZeroes?.(offsetBytes, lengthBytes, {
      mayTrim: (flags & nbd.NBD_CMD_FLAG_NO_HOLE) === 0,
      fua,
      fast: (flags & nbd.NBD_CMD_FLAG_FAST_ZERO) !== 0,
    })
  }
  return [emptyReply(request)]
}

const performRead = async (served: NbdExport, session: NegotiatedSession, request: NbdRequest, signal: AbortSignal): Promise<readonly Uint8Array[]> => {
  const { cookieHigh, cookieLow, offsetBytes, lengthBytes } = request
  if (!session.structuredReplies) {
    const data = lengthBytes === 0 ? [] : await readExactly(served, offsetBytes, lengthBytes, signal)
    return [emptyReply(request), ...data]
  }
  if (lengthBytes === 0) {
    const none = Buffer.allocUnsafe(NONE_CHUNK_BYTES)
    writeNoneChunk(none, 0, cookieHigh, cookieLow)
    return [none]
  }
  const pieces = await sparsePieces(served, request)
  const datas = await Promise.all(pieces.map(async (piece) => (piece.zero ? [] : readExactly(served, piece.offsetBytes, piece.lengthBytes, signal))))
  return pieces.flatMap((piece, index) => {
    const done = index === pieces.length - 1
    const head = Buffer.allocUnsafe(piece.zero ? OFFSET_HOLE_BYTES : OFFSET_DATA_HEADER_BYTES)
    if (piece.zero) writeOffsetHole(head, 0, done, cookieHigh, cookieLow, piece.offsetBytes, piece.lengthBytes)
    else writeOffsetDataHeader(head, 0, done, cookieHigh, cookieLow, piece.offsetBytes, piece.lengthBytes)
    return [head, ...(datas[index] ?? [])]
  })
}

const readExactly = async (served: NbdExport, offsetBytes: number, lengthBytes: number, signal: AbortSignal): Promise<readonly Uint8Array[]> => {
  const data = await served.read(offsetBytes, lengthBytes, signal)
  const gotBytes = data.reduce((sum, part) => sum + part.length, 0)
  if (gotBytes !== lengthBytes) throw new NbdRequestError(nbd.NBD_EIO, `the export read ${gotBytes} instead of ${lengthBytes} bytes`)
  return data
}

type Piece = { zero: boolean; offsetBytes: number; lengthBytes: number }

/** The range of a read as data and holes; one piece of data where sparse reading is not wanted, not possible or not worth it. */
const sparsePieces = async (served: NbdExport, request: NbdRequest): Promise<readonly Piece[]> => {
  const { offsetBytes, lengthBytes } = request
  const whole = [{ zero: false, offsetBytes, lengthBytes }]
  if (!served.sparseReads || !served.blockStatus || (request.flags & nbd.NBD_CMD_FLAG_DF) !== 0) return whole
  const extents = clipExtents(await served.blockStatus(nbd.BASE_ALLOCATION, offsetBytes, lengthBytes), lengthBytes)
  const pieces: Piece[] = []
  let at = offsetBytes
  const append = (zero: boolean, bytes: number): void => {
    const last = pieces.at(-1)
    if (last !== undefined && last.zero === zero) last.lengthBytes += bytes
    else if (bytes > 0) pieces.push({ zero, offsetBytes: at, lengthBytes: bytes })
    at += bytes
  }
  for (const extent of extents) append((extent.flags & nbd.NBD_STATE_ZERO) !== 0, extent.lengthBytes)
  append(false, offsetBytes + lengthBytes - at)
  return pieces.length <= MAX_SPARSE_PIECES ? pieces : whole
}

const performBlockStatus = async (served: NbdExport, session: NegotiatedSession, request: NbdRequest): Promise<readonly Uint8Array[]> => {
  const { offsetBytes, lengthBytes } = request
  const onlyOne = (request.flags & nbd.NBD_CMD_FLAG_REQ_ONE) !== 0
  const chunks: Buffer[] = []
  for (const [index, context] of session.metaContexts.entries()) {
    const all = clipExtents((await served.blockStatus?.(context, offsetBytes, lengthBytes)) ?? [], lengthBytes)
    const extents = all.slice(0, onlyOne ? 1 : MAX_EXTENTS)
    if (extents.length === 0) throw new NbdRequestError(nbd.NBD_EIO, `the export has no status for ${context}`)
    const chunk = Buffer.allocUnsafe(blockStatusBytes(extents.length))
    writeBlockStatus(chunk, 0, index === session.metaContexts.length - 1, request.cookieHigh, request.cookieLow, index + 1, extents)
    chunks.push(chunk)
  }
  return chunks
}

/** Extents without empty ones, ending at lengthBytes at the latest: what an export says may be longer than a u32. */
const clipExtents = (extents: readonly Extent[], lengthBytes: number): Extent[] => {
  const clipped: Extent[] = []
  let left = lengthBytes
  for (const extent of extents) {
    const take = Math.min(extent.lengthBytes, left)
    if (take <= 0) continue
    clipped.push({ lengthBytes: take, flags: extent.flags })
    left -= take
  }
  return clipped
}

const emptyReply = (request: NbdRequest): Buffer => {
  const out = Buffer.allocUnsafe(16)
  writeSimpleReply(out, 0, 0, request.cookieHigh, request.cookieLow)
  return out
}

const errorReply = (session: NegotiatedSession, request: NbdRequest, error: unknown): Buffer => {
  const errno = toNbdErrno(error)
  if (!session.structuredReplies) {
    const out = Buffer.allocUnsafe(16)
    writeSimpleReply(out, 0, errno, request.cookieHigh, request.cookieLow)
    return out
  }
  const message = Buffer.from(errorMessage(error), 'utf8').subarray(0, nbd.NBD_MAX_STRING_BYTES)
  const out = Buffer.allocUnsafe(errorChunkBytes(message.length))
  writeErrorChunk(out, 0, request.cookieHigh, request.cookieLow, errno, message)
  return out
}
