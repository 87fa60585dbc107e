import { CdpError } from '../errors/index.ts'
import * as nbd from './constants.ts'
import type { BlockSize } from './export.ts'
import { Gatherer } from './gatherer.ts'
import {
  encodeInfoBlockSize,
  encodeInfoExport,
  encodeInfoText,
  encodeOptionReply,
  encodeString,
  OPTION_HEADER_BYTES,
  OptionReader,
} from './option-codec.ts'
import { writeU64 } from './u64.ts'

/** What the negotiation has to know of an export. `transmissionFlags` without NBD_FLAG_SEND_DF, which is added where it applies. */
export type HandshakeExport = {
  name: string
  sizeBytes: number
  transmissionFlags: number
  description?: string | undefined
  blockSize: BlockSize
  metaContexts: readonly string[]
}

export type HandshakeOptions = {
  findExport(name: string): HandshakeExport | undefined
  listExports(): readonly { name: string; description?: string | undefined }[]
  /** False to refuse NBD_OPT_STRUCTURED_REPLY (and with it metadata contexts). Default true. */
  structuredReplies?: boolean
}

/** What both sides agreed on; block status ids are indexes into metaContexts + 1. */
export type NegotiatedSession = { exportName: string; structuredReplies: boolean; metaContexts: readonly string[] }

export type HandshakeEvent =
  | { is: 'list' }
  | { is: 'info'; exportName: string; found: boolean }
  | { is: 'go'; exportName: string; found: boolean }
  | { is: 'starttls-refused' }
  | { is: 'structured-replies' }
  | { is: 'meta-contexts-listed'; exportName: string }
  | { is: 'meta-contexts'; exportName: string; contexts: readonly string[] }
  | { is: 'unsupported'; option: number }

export type HandshakeOutcome = { is: 'transmission'; session: NegotiatedSession; rest: Buffer } | { is: 'aborted' }

/** Bytes to send now, what happened, and how it ended if it did. `rest` borrows from the pushed chunk. */
export type HandshakeStep = { send: readonly Buffer[]; events: readonly HandshakeEvent[]; outcome?: HandshakeOutcome }

/** More options than any client sends; bounds the work of one connection. */
const MAX_OPTIONS = 256

/**
 * The server's side of fixed newstyle negotiation (NBD specification, "Newstyle negotiation"); no I/O. Send greeting() first, then push what
 * arrives. @throws CdpError from push: NBD_PROTOCOL for what is not NBD or above a cap, NBD_REFUSED for EXPORT_NAME of an unknown export, which
 * the protocol can only answer by closing.
 */
export class ServerHandshake {
  readonly #options: HandshakeOptions
  readonly #gatherer = new Gatherer()
  #stage: 'client-flags' | 'option-header' | 'option-payload' | 'ended' = 'client-flags'
  #option = 0
  #optionCount = 0
  #fixedNewstyle = false
  #noZeroes = false
  #structuredReplies = false
  #metaContexts: { exportName: string; contexts: readonly string[] } = { exportName: '', contexts: [] }
  #send: Buffer[] = []
  #events: HandshakeEvent[] = []
  #outcome: { is: 'transmission'; session: NegotiatedSession } | { is: 'aborted' } | undefined

  constructor(options: HandshakeOptions) {
    this.#options = options
    this.#gatherer.expect(4)
  }

  greeting(): Buffer {
    const out = Buffer.allocUnsafe(18)
    out.writeUInt32BE(nbd.NBDMAGIC_HIGH, 0)
    out.writeUInt32BE(nbd.NBDMAGIC_LOW, 4)
    out.writeUInt32BE(nbd.IHAVEOPT_HIGH, 8)
    out.writeUInt32BE(nbd.IHAVEOPT_LOW, 12)
    out.writeUInt16BE(nbd.NBD_FLAG_FIXED_NEWSTYLE | nbd.NBD_FLAG_NO_ZEROES, 16)
    return out
  }

  push(chunk: Buffer): HandshakeStep {
    if (this.#stage === 'ended') throw new CdpError('INTERNAL', 'The NBD handshake is over.')
    this.#send = []
    this.#events = []
    let at = 0
    while (this.#outcome === undefined) {
      at = this.#gatherer.feed(chunk, at, chunk.length)
      if (!this.#gatherer.complete) break
      this.#advance(this.#gatherer.view())
    }
    const step = { send: this.#send, events: this.#events }
    if (this.#outcome === undefined) return step
    this.#stage = 'ended'
    return { ...step, outcome: this.#outcome.is === 'aborted' ? this.#outcome : { ...this.#outcome, rest: chunk.subarray(at) } }
  }

  #advance(bytes: Buffer): void {
    if (this.#stage === 'client-flags') {
      const flags = bytes.readUInt32BE(0)
      if ((flags & ~(nbd.NBD_FLAG_C_FIXED_NEWSTYLE | nbd.NBD_FLAG_C_NO_ZEROES)) !== 0) throw protocolError(`The client sent unknown flags (${flags}).`)
      this.#fixedNewstyle = (flags & nbd.NBD_FLAG_C_FIXED_NEWSTYLE) !== 0
      this.#noZeroes = (flags & nbd.NBD_FLAG_C_NO_ZEROES) !== 0
      this.#expectOption()
    } else if (this.#stage === 'option-header') {
      if (bytes.readUInt32BE(0) !== nbd.IHAVEOPT_HIGH || bytes.readUInt32BE(4) !== nbd.IHAVEOPT_LOW) {
        throw protocolError('An option does not begin with IHAVEOPT.')
      }
      this.#option = bytes.readUInt32BE(8)
      const lengthBytes = bytes.readUInt32BE(12)
      if (lengthBytes > nbd.MAX_OPTION_BYTES) throw protocolError(`An option of ${lengthBytes} bytes is longer than the ${nbd.MAX_OPTION_BYTES} allowed.`)
      this.#optionCount += 1
      if (this.#optionCount > MAX_OPTIONS) throw protocolError(`The client sent more than ${MAX_OPTIONS} options.`)
      this.#stage = 'option-payload'
      this.#gatherer.expect(lengthBytes)
    } else {
      this.#haggle(this.#option, bytes)
      this.#expectOption()
    }
  }

  #expectOption(): void {
    this.#stage = 'option-header'
    this.#gatherer.expect(OPTION_HEADER_BYTES)
  }

  #haggle(option: number, payload: Buffer): void {
    if (!this.#fixedNewstyle && option !== nbd.NBD_OPT_EXPORT_NAME) throw protocolError('A client without fixed newstyle may send NBD_OPT_EXPORT_NAME only.')
    switch (option) {
      case nbd.NBD_OPT_EXPORT_NAME:
        return this.#exportName(payload)
      case nbd.NBD_OPT_ABORT:
        this.#reply(nbd.NBD_REP_ACK)
        this.#outcome = { is: 'aborted' }
        return
      case nbd.NBD_OPT_LIST:
        return this.#list(payload)
      case nbd.NBD_OPT_INFO:
      case nbd.NBD_OPT_GO:
        return this.#infoOrGo(payload)
      case nbd.NBD_OPT_STRUCTURED_REPLY:
        return this.#structuredReply(payload)
      case nbd.NBD_OPT_LIST_META_CONTEXT:
      case nbd.NBD_OPT_SET_META_CONTEXT:
        return this.#metaContext(payload)
      case nbd.NBD_OPT_STARTTLS:
        this.#events.push({ is: 'starttls-refused' })
        return this.#refuse(nbd.NBD_REP_ERR_UNSUP, 'TLS is not spoken on this socket')
      default:
        this.#events.push({ is: 'unsupported', option })
        return this.#refuse(nbd.NBD_REP_ERR_UNSUP, 'unknown option')
    }
  }

  #exportName(payload: Buffer): void {
    if (payload.length > nbd.NBD_MAX_STRING_BYTES) throw protocolError('An export name is longer than 4096 bytes.')
    const exportName = payload.toString('utf8')
    const found = this.#options.findExport(exportName)
    this.#events.push({ is: 'go', exportName, found: found !== undefined })
    if (found === undefined) throw new CdpError('NBD_REFUSED', 'The client asked for an export that does not exist.', { context: { exportName } })
    const out = Buffer.alloc(this.#noZeroes ? 10 : 134)
    writeU64(out, found.sizeBytes, 0)
    out.writeUInt16BE(this.#flagsOf(found), 8)
    this.#send.push(out)
    this.#enterTransmission(exportName)
  }

  #list(payload: Buffer): void {
    if (payload.length > 0) return this.#refuse(nbd.NBD_REP_ERR_INVALID, 'NBD_OPT_LIST takes no data')
    this.#events.push({ is: 'list' })
    for (const { name, description } of this.#options.listExports()) {
      const encoded = encodeString(name)
      this.#reply(nbd.NBD_REP_SERVER, encoded, Buffer.from(description ?? '', 'utf8').subarray(0, nbd.NBD_MAX_STRING_BYTES))
    }
    this.#reply(nbd.NBD_REP_ACK)
  }

  #infoOrGo(payload: Buffer): void {
    const reader = new OptionReader(payload)
    const exportName = reader.string()
    const count = exportName === undefined ? undefined : reader.u16()
    if (exportName === undefined || count === undefined) return this.#refuse(nbd.NBD_REP_ERR_INVALID, 'malformed request')
    const wanted = new Set<number>()
    for (let i = 0; i < count; i++) {
      const type = reader.u16()
      if (type === undefined) return this.#refuse(nbd.NBD_REP_ERR_INVALID, 'malformed request')
      wanted.add(type)
    }
    if (!reader.atEnd) return this.#refuse(nbd.NBD_REP_ERR_INVALID, 'malformed request')
    const found = this.#options.findExport(exportName)
    this.#events.push({ is: this.#option === nbd.NBD_OPT_GO ? 'go' : 'info', exportName, found: found !== undefined })
    if (found === undefined) return this.#refuse(nbd.NBD_REP_ERR_UNKNOWN, `export '${exportName.slice(0, 256)}' does not exist`)
    this.#reply(nbd.NBD_REP_INFO, encodeInfoExport(found.sizeBytes, this.#flagsOf(found)))
    this.#reply(nbd.NBD_REP_INFO, encodeInfoBlockSize(found.blockSize))
    if (wanted.has(nbd.NBD_INFO_NAME)) this.#reply(nbd.NBD_REP_INFO, encodeInfoText(nbd.NBD_INFO_NAME, found.name))
    if (wanted.has(nbd.NBD_INFO_DESCRIPTION) && found.description !== undefined) {
      this.#reply(nbd.NBD_REP_INFO, encodeInfoText(nbd.NBD_INFO_DESCRIPTION, found.description))
    }
    this.#reply(nbd.NBD_REP_ACK)
    if (this.#option === nbd.NBD_OPT_GO) this.#enterTransmission(exportName)
  }

  #structuredReply(payload: Buffer): void {
    if (payload.length > 0) return this.#refuse(nbd.NBD_REP_ERR_INVALID, 'NBD_OPT_STRUCTURED_REPLY takes no data')
    if (this.#options.structuredReplies === false) return this.#refuse(nbd.NBD_REP_ERR_UNSUP, 'structured replies are switched off')
    this.#structuredReplies = true
    this.#events.push({ is: 'structured-replies' })
    this.#reply(nbd.NBD_REP_ACK)
  }

  #metaContext(payload: Buffer): void {
    const setting = this.#option === nbd.NBD_OPT_SET_META_CONTEXT
    if (setting) this.#metaContexts = { exportName: '', contexts: [] }
    if (!this.#structuredReplies) return this.#refuse(nbd.NBD_REP_ERR_INVALID, 'structured replies have to be negotiated first')
    const reader = new OptionReader(payload)
    const exportName = reader.string()
    const count = exportName === undefined ? undefined : reader.u32()
    if (exportName === undefined || count === undefined) return this.#refuse(nbd.NBD_REP_ERR_INVALID, 'malformed request')
    const queries = new Set<string>()
    for (let i = 0; i < count; i++) {
      const query = reader.string()
      if (query === undefined) return this.#refuse(nbd.NBD_REP_ERR_INVALID, 'malformed request')
      queries.add(query)
    }
    if (!reader.atEnd) return this.#refuse(nbd.NBD_REP_ERR_INVALID, 'malformed request')
    const found = this.#options.findExport(exportName)
    if (found === undefined) return this.#refuse(nbd.NBD_REP_ERR_UNKNOWN, `export '${exportName.slice(0, 256)}' does not exist`)
    const contexts = found.metaContexts.filter((context) => (setting ? queries.has(context) : isListed(context, queries)))
    contexts.forEach((context, index) => {
      const id = Buffer.allocUnsafe(4)
      id.writeUInt32BE(setting ? index + 1 : 0, 0)
      this.#reply(nbd.NBD_REP_META_CONTEXT, id, Buffer.from(context, 'utf8'))
    })
    this.#reply(nbd.NBD_REP_ACK)
    if (setting) this.#metaContexts = { exportName, contexts }
    this.#events.push(setting ? { is: 'meta-contexts', exportName, contexts } : { is: 'meta-contexts-listed', exportName })
  }

  #flagsOf(found: HandshakeExport): number {
    return this.#structuredReplies ? found.transmissionFlags | nbd.NBD_FLAG_SEND_DF : found.transmissionFlags
  }

  #enterTransmission(exportName: string): void {
    const metaContexts = this.#metaContexts.exportName === exportName ? this.#metaContexts.contexts : []
    this.#outcome = { is: 'transmission', session: { exportName, structuredReplies: this.#structuredReplies, metaContexts } }
  }

  #reply(type: number, ...payload: Buffer[]): void {
    this.#send.push(encodeOptionReply(this.#option, type, payload))
  }

  #refuse(type: number, why: string): void {
    this.#reply(type, Buffer.from(why, 'utf8'))
  }
}

const protocolError = (message: string): CdpError => new CdpError('NBD_PROTOCOL', message)

/** NBD_OPT_LIST_META_CONTEXT: no query lists all, "base:" lists a namespace, "qemu:dirty-bitmap:" everything below it. */
const isListed = (context: string, queries: ReadonlySet<string>): boolean => {
  if (queries.size === 0 || queries.has(context)) return true
  for (const query of queries) if (query.endsWith(':') && context.startsWith(query)) return true
  return false
}
