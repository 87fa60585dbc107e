import { CdpError } from '../errors/index.ts'
import { NBD_CMD_WRITE, NBD_REQUEST_MAGIC, REQUEST_HEADER_BYTES } from './constants.ts'

// Request header (NBD specification, "Request message"), 28 bytes, big-endian:
//   0  u32  magic 0x25609513
//   4  u16  command flags
//   6  u16  type
//   8  u64  cookie, opaque, kept as two u32
//  16  u64  offset, must be < 2^53
//  24  u32  length
//  28  ...  payload of `length` bytes, NBD_CMD_WRITE only

const TWO_TO_32 = 0x1_0000_0000
const MAX_OFFSET_HIGH = 0x1f_ffff

/**
 * Receives what the parser finds, in the order of the stream. Callbacks must not call back into the parser; what one of them throws leaves push, and
 * the rest of that chunk is lost: end the connection then.
 */
export interface RequestSink {
  /** A header is complete. For a WRITE, `lengthBytes` of payload follow by onPayload or advancePayload. */
  onRequest(type: number, flags: number, cookieHigh: number, cookieLow: number, offsetBytes: number, lengthBytes: number): void
  /** A piece of the payload of the last request: bytes start..end of chunk, borrowed for the duration of the call. */
  onPayload(chunk: Buffer, start: number, end: number): void
  /** The last request, with its payload if any, is complete. */
  onRequestEnd(): void
}

/**
 * The transmission phase as a server reads it; no I/O, no allocation per request. Gives the same events for any chunking, but for the cuts between
 * onPayload calls. After a thrown CdpError NBD_PROTOCOL the stream has no meaning any more: every later push throws.
 */
export class RequestParser {
  readonly #sink: RequestSink
  readonly #maxPayloadBytes: number
  readonly #header = Buffer.alloc(REQUEST_HEADER_BYTES)
  #headerFilledBytes = 0
  #pendingBytes = 0
  #broken = false

  constructor(sink: RequestSink, limits: { maxPayloadBytes: number }) {
    this.#sink = sink
    this.#maxPayloadBytes = limits.maxPayloadBytes
  }

  /** Payload bytes of the present WRITE that have not arrived yet; 0 between requests. */
  get payloadPendingBytes(): number {
    return this.#pendingBytes
  }

  /** True when the stream stands between two requests: an end of the connection here loses no half request. */
  get atRequestBoundary(): boolean {
    return this.#pendingBytes === 0 && this.#headerFilledBytes === 0
  }

  /** @throws CdpError NBD_PROTOCOL: wrong magic, offset of 2^53 or more, WRITE longer than maxPayloadBytes */
  push(chunk: Buffer, start = 0, end = chunk.length): void {
    if (this.#broken) throw new CdpError('NBD_PROTOCOL', 'The request stream is broken already.')
    let at = start
    while (at < end) {
      if (this.#pendingBytes > 0) {
        const stop = Math.min(at + this.#pendingBytes, end)
        this.#pendingBytes -= stop - at
        this.#sink.onPayload(chunk, at, stop)
        at = stop
        if (this.#pendingBytes === 0) this.#sink.onRequestEnd()
      } else if (this.#headerFilledBytes === 0 && end - at >= REQUEST_HEADER_BYTES) {
        this.#takeHeader(chunk, at)
        at += REQUEST_HEADER_BYTES
      } else {
        const stop = Math.min(at + REQUEST_HEADER_BYTES - this.#headerFilledBytes, end)
        chunk.copy(this.#header, this.#headerFilledBytes, at, stop)
        this.#headerFilledBytes += stop - at
        at = stop
        if (this.#headerFilledBytes === REQUEST_HEADER_BYTES) {
          this.#headerFilledBytes = 0
          this.#takeHeader(this.#header, 0)
        }
      }
    }
  }

  /**
   * Payload bytes were read straight from the socket to where they belong; calls onRequestEnd with the last of them.
   * @throws CdpError INTERNAL when more is claimed than is pending
   */
  advancePayload(lengthBytes: number): void {
    if (lengthBytes > this.#pendingBytes || lengthBytes < 0) {
      throw new CdpError('INTERNAL', 'More payload advanced than pending.', { context: { lengthBytes, pendingBytes: this.#pendingBytes } })
    }
    if (lengthBytes === 0) return
    this.#pendingBytes -= lengthBytes
    if (this.#pendingBytes === 0) this.#sink.onRequestEnd()
  }

  #takeHeader(bytes: Buffer, at: number): void {
    if (bytes.readUInt32BE(at) !== NBD_REQUEST_MAGIC) this.#break('A request does not begin with the request magic.')
    const type = bytes.readUInt16BE(at + 6)
    const offsetHigh = bytes.readUInt32BE(at + 16)
    const lengthBytes = bytes.readUInt32BE(at + 24)
    if (offsetHigh > MAX_OFFSET_HIGH) this.#break('The offset of a request is 2^53 or larger.')
    if (type === NBD_CMD_WRITE) {
      if (lengthBytes > this.#maxPayloadBytes) this.#break(`A write of ${lengthBytes} bytes is longer than the ${this.#maxPayloadBytes} allowed.`)
      this.#pendingBytes = lengthBytes
    }
    this.#sink.onRequest(
      type,
      bytes.readUInt16BE(at + 4),
      bytes.readUInt32BE(at + 8),
      bytes.readUInt32BE(at + 12),
      offsetHigh * TWO_TO_32 + bytes.readUInt32BE(at + 20),
      lengthBytes,
    )
    if (this.#pendingBytes === 0) this.#sink.onRequestEnd()
  }

  #break(message: string): never {
    this.#broken = true
    throw new CdpError('NBD_PROTOCOL', message)
  }
}
