import { CdpError } from '../errors/index.ts'
import * as nbd from './constants.ts'
import type { Extent } from './export.ts'
import { Gatherer } from './gatherer.ts'
import { readU64 } from './u64.ts'

/** Receives what the parser finds, in the order of the stream. Callbacks may throw CdpError NBD_PROTOCOL; they must not call back into the parser. */
export interface ReplySink {
  /** @returns how many bytes of data follow: the length of the request for a READ without error, else 0 */
  onSimpleReply(error: number, cookieHigh: number, cookieLow: number): number
  /** Data of a READ begins; `lengthBytes` of onPayload follow, for offsetBytes and on. */
  onData(cookieHigh: number, cookieLow: number, offsetBytes: number, lengthBytes: number): void
  /** Bytes start..end of chunk, borrowed for the duration of the call. */
  onPayload(chunk: Buffer, start: number, end: number): void
  onHole(cookieHigh: number, cookieLow: number, offsetBytes: number, lengthBytes: number): void
  onBlockStatus(cookieHigh: number, cookieLow: number, contextId: number, extents: Extent[]): void
  onError(cookieHigh: number, cookieLow: number, error: number, message: string): void
  /** Nothing more comes for this cookie. */
  onReplyEnd(cookieHigh: number, cookieLow: number): void
}

/** Largest chunk that is gathered before it is looked at: a block status of half a million extents. */
const MAX_CONTROL_BYTES = 4 * 1024 * 1024 + 4

/**
 * The transmission phase as a client reads it: simple replies and structured chunks, no I/O. Same events for any chunking, but for the cuts between
 * onPayload calls. @throws CdpError NBD_PROTOCOL from push, after which the stream has no meaning any more
 */
export class ReplyParser {
  readonly #sink: ReplySink
  readonly #gatherer = new Gatherer()
  #stage: 'magic' | 'structured-length' | 'data-offset' | 'control' | 'payload' = 'magic'
  #chunkFlags = 0
  #chunkType = 0
  #cookieHigh = 0
  #cookieLow = 0
  #chunkBytes = 0
  #payloadBytes = 0
  #endsReply = false

  constructor(sink: ReplySink) {
    this.#sink = sink
    this.#gatherer.expect(nbd.SIMPLE_REPLY_BYTES)
  }

  push(chunk: Buffer, start = 0, end = chunk.length): void {
    let at = start
    while (at < end) {
      if (this.#stage === 'payload') {
        const stop = Math.min(at + this.#payloadBytes, end)
        this.#payloadBytes -= stop - at
        this.#sink.onPayload(chunk, at, stop)
        at = stop
        if (this.#payloadBytes === 0) this.#endChunk()
        continue
      }
      at = this.#gatherer.feed(chunk, at, end)
      if (this.#gatherer.complete) this.#advance(this.#gatherer.view())
    }
  }

  #advance(bytes: Buffer): void {
    if (this.#stage === 'magic') this.#replyHeader(bytes)
    else if (this.#stage === 'structured-length') this.#structuredHeader(bytes.readUInt32BE(0))
    else if (this.#stage === 'data-offset') {
      this.#payloadBytes = this.#chunkBytes - 8
      this.#sink.onData(this.#cookieHigh, this.#cookieLow, readU64(bytes, 0), this.#payloadBytes)
      this.#stage = 'payload'
    } else {
      this.#control(bytes)
      this.#endChunk()
    }
  }

  #replyHeader(bytes: Buffer): void {
    const magic = bytes.readUInt32BE(0)
    this.#cookieHigh = bytes.readUInt32BE(8)
    this.#cookieLow = bytes.readUInt32BE(12)
    if (magic === nbd.NBD_STRUCTURED_REPLY_MAGIC) {
      this.#chunkFlags = bytes.readUInt16BE(4)
      this.#chunkType = bytes.readUInt16BE(6)
      this.#expect('structured-length', 4)
    } else if (magic === nbd.NBD_SIMPLE_REPLY_MAGIC) {
      this.#endsReply = true
      this.#payloadBytes = this.#sink.onSimpleReply(bytes.readUInt32BE(4), this.#cookieHigh, this.#cookieLow)
      if (this.#payloadBytes > 0) this.#stage = 'payload'
      else this.#endChunk()
    } else throw protocolError('A reply does not begin with a reply magic.')
  }

  #structuredHeader(lengthBytes: number): void {
    this.#endsReply = (this.#chunkFlags & nbd.NBD_REPLY_FLAG_DONE) !== 0
    this.#chunkBytes = lengthBytes
    if (this.#chunkType === nbd.NBD_REPLY_TYPE_OFFSET_DATA) {
      if (lengthBytes <= 8) throw protocolError('An offset-data chunk carries no data.')
      this.#expect('data-offset', 8)
      return
    }
    if (lengthBytes > MAX_CONTROL_BYTES) throw protocolError(`A reply chunk of ${lengthBytes} bytes is too long.`)
    if (lengthBytes > 0) {
      this.#expect('control', lengthBytes)
      return
    }
    if (this.#chunkType !== nbd.NBD_REPLY_TYPE_NONE) throw protocolError(`A reply chunk of type ${this.#chunkType} is empty.`)
    if (!this.#endsReply) throw protocolError('A chunk without content does not end its reply.')
    this.#endChunk()
  }

  #control(bytes: Buffer): void {
    if (this.#chunkType === nbd.NBD_REPLY_TYPE_OFFSET_HOLE) {
      if (bytes.length !== 12) throw protocolError('An offset-hole chunk has a wrong length.')
      this.#sink.onHole(this.#cookieHigh, this.#cookieLow, readU64(bytes, 0), bytes.readUInt32BE(8))
    } else if (this.#chunkType === nbd.NBD_REPLY_TYPE_BLOCK_STATUS) {
      if (bytes.length < 12 || (bytes.length - 4) % 8 !== 0) throw protocolError('A block status chunk has a wrong length.')
      const extents: Extent[] = []
      for (let at = 4; at < bytes.length; at += 8) extents.push({ lengthBytes: bytes.readUInt32BE(at), flags: bytes.readUInt32BE(at + 4) })
      this.#sink.onBlockStatus(this.#cookieHigh, this.#cookieLow, bytes.readUInt32BE(0), extents)
    } else if ((this.#chunkType & 0x8000) !== 0) {
      // All error chunks, unknown ones too, begin with u32 error, u16 message length, message.
      if (bytes.length < 6 || bytes.readUInt16BE(4) > bytes.length - 6) throw protocolError('An error chunk has a wrong length.')
      this.#sink.onError(this.#cookieHigh, this.#cookieLow, bytes.readUInt32BE(0), bytes.toString('utf8', 6, 6 + bytes.readUInt16BE(4)))
    } else throw protocolError(`The server sent a chunk of unknown type ${this.#chunkType}.`)
  }

  #endChunk(): void {
    this.#expect('magic', nbd.SIMPLE_REPLY_BYTES)
    if (this.#endsReply) this.#sink.onReplyEnd(this.#cookieHigh, this.#cookieLow)
  }

  #expect(stage: 'magic' | 'structured-length' | 'data-offset' | 'control', lengthBytes: number): void {
    this.#stage = stage
    this.#gatherer.expect(lengthBytes)
  }
}

const protocolError = (message: string): CdpError => new CdpError('NBD_PROTOCOL', message)
