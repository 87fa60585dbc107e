import { CdpError } from '../errors/index.ts'
import * as nbd from './constants.ts'
import type { BlockSize } from './export.ts'
import { Gatherer } from './gatherer.ts'
import { encodeOption, encodeString, OPTION_REPLY_HEADER_BYTES } from './option-codec.ts'
import { readU64 } from './u64.ts'

export type ClientHandshakeOptions = {
  exportName: string
  /** Exact names, for example base:allocation or qemu:dirty-bitmap:NAME; what the server lacks is left out of the session. */
  metaContexts?: readonly string[]
  /** False to stay with simple replies. Default true. */
  structuredReplies?: boolean
}

export type ClientSession = {
  sizeBytes: number
  transmissionFlags: number
  structuredReplies: boolean
  blockSize: BlockSize
  /** Context name by the id the server uses in block status replies. */
  metaContexts: ReadonlyMap<number, string>
}

export type ClientHandshakeStep = { send: readonly Buffer[]; outcome?: { session: ClientSession; rest: Buffer } }

/** What the specification lets a client assume of a server that tells no block sizes; larger alignments are met by servers in practice. */
const ASSUMED_BLOCK_SIZE: BlockSize = { minBytes: 1, preferredBytes: 4096, maxBytes: nbd.DEFAULT_MAX_PAYLOAD_BYTES }

/**
 * The client's side of newstyle negotiation, no I/O: structured replies, metadata contexts, GO, and EXPORT_NAME for servers that have no GO.
 * @throws CdpError from push: NBD_PROTOCOL for what is not NBD, NBD_REFUSED when the server refuses the export
 */
export class ClientHandshake {
  readonly #options: ClientHandshakeOptions
  readonly #gatherer = new Gatherer()
  #stage: 'greeting' | 'reply-header' | 'reply-payload' | 'export-name' | 'ended' = 'greeting'
  #option = 0
  #replyType = 0
  #noZeroes = false
  #sizeBytes: number | undefined
  #transmissionFlags = 0
  #structuredReplies = false
  #blockSize = ASSUMED_BLOCK_SIZE
  readonly #metaContexts = new Map<number, string>()
  #send: Buffer[] = []

  constructor(options: ClientHandshakeOptions) {
    this.#options = options
    this.#gatherer.expect(18)
  }

  push(chunk: Buffer): ClientHandshakeStep {
    this.#send = []
    let at = 0
    while (this.#stage !== 'ended') {
      at = this.#gatherer.feed(chunk, at, chunk.length)
      if (!this.#gatherer.complete) return { send: this.#send }
      this.#advance(this.#gatherer.view())
    }
    const session: ClientSession = {
      sizeBytes: this.#sizeBytes ?? 0,
      transmissionFlags: this.#transmissionFlags,
      structuredReplies: this.#structuredReplies,
      blockSize: this.#blockSize,
      metaContexts: this.#metaContexts,
    }
    return { send: this.#send, outcome: { session, rest: chunk.subarray(at) } }
  }

  #advance(bytes: Buffer): void {
    if (this.#stage === 'greeting') this.#greeting(bytes)
    else if (this.#stage === 'reply-header') this.#replyHeader(bytes)
    else if (this.#stage === 'reply-payload') this.#reply(bytes)
    else {
      this.#sizeBytes = readU64(bytes, 0)
      this.#transmissionFlags = bytes.readUInt16BE(8)
      this.#stage = 'ended'
    }
  }

  #greeting(bytes: Buffer): void {
    if (bytes.readUInt32BE(0) !== nbd.NBDMAGIC_HIGH || bytes.readUInt32BE(4) !== nbd.NBDMAGIC_LOW) {
      throw protocolError('The peer does not greet like an NBD server.')
    }
    if (bytes.readUInt32BE(8) !== nbd.IHAVEOPT_HIGH || bytes.readUInt32BE(12) !== nbd.IHAVEOPT_LOW) {
      throw new CdpError('NBD_REFUSED', 'The NBD server speaks the oldstyle handshake only.', { hint: 'Serve the export with a current NBD server.' })
    }
    const serverFlags = bytes.readUInt16BE(16)
    this.#noZeroes = (serverFlags & nbd.NBD_FLAG_NO_ZEROES) !== 0
    const fixedNewstyle = (serverFlags & nbd.NBD_FLAG_FIXED_NEWSTYLE) !== 0
    const clientFlags = Buffer.alloc(4)
    clientFlags.writeUInt32BE((fixedNewstyle ? nbd.NBD_FLAG_C_FIXED_NEWSTYLE : 0) | (this.#noZeroes ? nbd.NBD_FLAG_C_NO_ZEROES : 0), 0)
    this.#send.push(clientFlags)
    if (!fixedNewstyle) this.#askExportName()
    else if (this.#options.structuredReplies === false) this.#askGo()
    else this.#ask(nbd.NBD_OPT_STRUCTURED_REPLY)
  }

  #replyHeader(bytes: Buffer): void {
    if (bytes.readUInt32BE(0) !== nbd.NBD_OPT_REPLY_MAGIC_HIGH || bytes.readUInt32BE(4) !== nbd.NBD_OPT_REPLY_MAGIC_LOW) {
      throw protocolError('An option reply does not begin with its magic.')
    }
    if (bytes.readUInt32BE(8) !== this.#option) throw protocolError('The server answers an option that was not sent.')
    this.#replyType = bytes.readUInt32BE(12)
    const lengthBytes = bytes.readUInt32BE(16)
    if (lengthBytes > nbd.MAX_OPTION_BYTES) throw protocolError(`An option reply of ${lengthBytes} bytes is too long.`)
    this.#stage = 'reply-payload'
    this.#gatherer.expect(lengthBytes)
  }

  #reply(payload: Buffer): void {
    const type = this.#replyType
    const refused = type >= nbd.NBD_REP_FLAG_ERROR
    switch (this.#option) {
      case nbd.NBD_OPT_STRUCTURED_REPLY:
        if (!refused && type !== nbd.NBD_REP_ACK) throw protocolError('The server answers NBD_OPT_STRUCTURED_REPLY with nonsense.')
        this.#structuredReplies = !refused
        return this.#structuredReplies && (this.#options.metaContexts?.length ?? 0) > 0 ? this.#askMetaContexts() : this.#askGo()
      case nbd.NBD_OPT_SET_META_CONTEXT:
        if (type === nbd.NBD_REP_META_CONTEXT) return this.#metaContext(payload)
        if (!refused && type !== nbd.NBD_REP_ACK) throw protocolError('The server answers NBD_OPT_SET_META_CONTEXT with nonsense.')
        // A refusal is no end: the export may still be readable without contexts, or GO says better why not.
        if (refused) this.#metaContexts.clear()
        return this.#askGo()
      default:
        return this.#goReply(type, payload, refused)
    }
  }

  #goReply(type: number, payload: Buffer, refused: boolean): void {
    if (type === nbd.NBD_REP_INFO) return this.#info(payload)
    if (type === nbd.NBD_REP_ACK) {
      if (this.#sizeBytes === undefined) throw protocolError('The server acknowledges NBD_OPT_GO without NBD_INFO_EXPORT.')
      this.#stage = 'ended'
      return
    }
    if (type === nbd.NBD_REP_ERR_UNSUP) return this.#askExportName()
    if (!refused) throw protocolError('The server answers NBD_OPT_GO with nonsense.')
    const reason = payload.toString('utf8', 0, nbd.NBD_MAX_STRING_BYTES)
    throw new CdpError('NBD_REFUSED', `NBD server refused export '${this.#options.exportName}'${reason === '' ? '' : `: ${reason}`}.`, {
      ...(type === nbd.NBD_REP_ERR_TLS_REQD ? { hint: 'The server wants TLS on this socket.' } : {}),
      context: { exportName: this.#options.exportName, replyType: type },
    })
  }

  #info(payload: Buffer): void {
    this.#expectReply()
    if (payload.length < 2) throw protocolError('NBD_REP_INFO is too short.')
    const infoType = payload.readUInt16BE(0)
    if (infoType === nbd.NBD_INFO_EXPORT) {
      if (payload.length !== 12) throw protocolError('NBD_INFO_EXPORT has a wrong length.')
      this.#sizeBytes = readU64(payload, 2)
      this.#transmissionFlags = payload.readUInt16BE(10)
    } else if (infoType === nbd.NBD_INFO_BLOCK_SIZE) {
      if (payload.length !== 14) throw protocolError('NBD_INFO_BLOCK_SIZE has a wrong length.')
      const [minBytes, preferredBytes, maxBytes] = [payload.readUInt32BE(2), payload.readUInt32BE(6), payload.readUInt32BE(10)]
      if (!isPowerOfTwo(minBytes) || !isPowerOfTwo(preferredBytes) || preferredBytes < minBytes || maxBytes < minBytes) {
        throw protocolError('The server announces impossible block sizes.')
      }
      // A server without a limit says 0xffffffff; a request then still has to fit into memory on both sides.
      const cappedBytes = Math.min(maxBytes, nbd.DEFAULT_MAX_PAYLOAD_BYTES)
      this.#blockSize = { minBytes, preferredBytes, maxBytes: Math.max(minBytes, cappedBytes - (cappedBytes % minBytes)) }
    }
  }

  #metaContext(payload: Buffer): void {
    this.#expectReply()
    if (payload.length < 4) throw protocolError('NBD_REP_META_CONTEXT is too short.')
    const name = payload.toString('utf8', 4)
    if (!this.#options.metaContexts?.includes(name)) throw protocolError('The server offers a metadata context that was not asked for.')
    this.#metaContexts.set(payload.readUInt32BE(0), name)
  }

  #askMetaContexts(): void {
    const queries = this.#options.metaContexts ?? []
    const count = Buffer.alloc(4)
    count.writeUInt32BE(queries.length, 0)
    this.#ask(nbd.NBD_OPT_SET_META_CONTEXT, [encodeString(this.#options.exportName), count, ...queries.map(encodeString)])
  }

  #askGo(): void {
    const infos = Buffer.alloc(4)
    infos.writeUInt16BE(1, 0)
    infos.writeUInt16BE(nbd.NBD_INFO_BLOCK_SIZE, 2)
    this.#ask(nbd.NBD_OPT_GO, [encodeString(this.#options.exportName), infos])
  }

  #askExportName(): void {
    this.#option = nbd.NBD_OPT_EXPORT_NAME
    this.#send.push(encodeOption(nbd.NBD_OPT_EXPORT_NAME, [encodeString(this.#options.exportName).subarray(4)]))
    this.#stage = 'export-name'
    this.#gatherer.expect(this.#noZeroes ? 10 : 134)
  }

  #ask(option: number, payload: readonly Buffer[] = []): void {
    this.#option = option
    this.#send.push(encodeOption(option, payload))
    this.#expectReply()
  }

  #expectReply(): void {
    this.#stage = 'reply-header'
    this.#gatherer.expect(OPTION_REPLY_HEADER_BYTES)
  }
}

const protocolError = (message: string): CdpError => new CdpError('NBD_PROTOCOL', message)

const isPowerOfTwo = (value: number): boolean => value > 0 && (value & (value - 1)) === 0
