import { CdpError } from '../errors/index.ts'
import { MAX_FRAME_MESSAGE_BYTES, MAX_OTHER_MESSAGE_BYTES, MESSAGE_HEADER_BYTES, MessageType } from './messages.ts'

/** Less than that is read with what follows it. */
const DIRECT_READ_BYTES = 4096
const KNOWN = new Set<number>(Object.values(MessageType))

/**
 * Cuts a byte stream into messages (docs/format.md, Stream). No I/O: `push` calls `onMessage` for each complete message.
 * Each body is its own buffer, read straight into or copied once out of the chunks, and belongs to the receiver.
 * @throws from push: CdpError STREAM_PROTOCOL for an unknown type or a message above its cap; the parser is unusable afterwards
 */
export class MessageParser {
  readonly #onMessage: (type: MessageType, body: Buffer) => void
  readonly #allocate: (lengthBytes: number) => Buffer
  readonly #header = Buffer.alloc(MESSAGE_HEADER_BYTES)
  #headerBytes = 0
  #body: Buffer | undefined
  #bodyBytes = 0

  constructor(onMessage: (type: MessageType, body: Buffer) => void, allocate = (lengthBytes: number): Buffer => Buffer.allocUnsafeSlow(lengthBytes)) {
    this.#onMessage = onMessage
    this.#allocate = allocate
  }

  /**
   * Where the rest of the present body goes: bytes read straight to there are told by `advance`. Undefined between bodies, or when little of it is left:
   * then `push` what comes.
   */
  placeForBody(): Buffer | undefined {
    const body = this.#body
    return body !== undefined && body.length - this.#bodyBytes >= DIRECT_READ_BYTES ? body.subarray(this.#bodyBytes) : undefined
  }

  /** So many bytes were read to where `placeForBody` said. */
  advance(lengthBytes: number): void {
    const body = this.#body
    if (body === undefined || lengthBytes > body.length - this.#bodyBytes) throw new CdpError('INTERNAL', 'more of a message was read than is missing')
    this.#bodyBytes += lengthBytes
    if (this.#bodyBytes === body.length) this.#finish(body)
  }

  /** The next bytes of the stream, `lengthBytes` of `chunk`. */
  push(chunk: Buffer, lengthBytes = chunk.length): void {
    let at = 0
    while (at < lengthBytes) {
      if (this.#body === undefined) {
        const take = Math.min(MESSAGE_HEADER_BYTES - this.#headerBytes, lengthBytes - at)
        chunk.copy(this.#header, this.#headerBytes, at, at + take)
        this.#headerBytes += take
        at += take
        if (this.#headerBytes < MESSAGE_HEADER_BYTES) return
        this.#body = this.#allocate(this.#checkedLength())
        this.#bodyBytes = 0
      }
      const body = this.#body
      const take = Math.min(body.length - this.#bodyBytes, lengthBytes - at)
      chunk.copy(body, this.#bodyBytes, at, at + take)
      this.#bodyBytes += take
      at += take
      if (this.#bodyBytes === body.length) this.#finish(body)
    }
  }

  #finish(body: Buffer): void {
    this.#body = undefined
    this.#headerBytes = 0
    this.#onMessage(this.#header[4] as MessageType, body)
  }

  #checkedLength(): number {
    const lengthBytes = this.#header.readUInt32LE(0)
    const type = this.#header[4]
    if (!KNOWN.has(type)) throw new CdpError('STREAM_PROTOCOL', `message of unknown type ${type}`)
    if (lengthBytes > (type === MessageType.frame ? MAX_FRAME_MESSAGE_BYTES : MAX_OTHER_MESSAGE_BYTES)) {
      throw new CdpError('STREAM_PROTOCOL', 'message is too large', { context: { type, bytes: lengthBytes } })
    }
    return lengthBytes
  }
}
