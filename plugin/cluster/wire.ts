import { Type } from '@sinclair/typebox'
import type { Static } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'
import { VmStatus } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'

// What nodes of one cluster say to each other over cdp-node/1: messages of
//
//   offset  size  field
//   0       4     length of the body in bytes, little-endian, at most 8 MiB
//   4       n     JSON: a request { id, ask, ... } from the side that connected, or an answer { id, answer } or { id, error } to it
//
// A request that is not known is answered with an error. A field may be added without a new protocol name.

const MAX_BODY_BYTES = 8 * 1024 * 1024
const HEADER_BYTES = 4

const CutId = Type.String({ minLength: 1, maxLength: 64 })
const Vpg = Type.String({ minLength: 1, maxLength: 64 })
const Checkpoint = Type.Object({ id: Type.String(), atUnixMs: Type.Number() })
const Mark = Type.Object({
  id: Type.String({ maxLength: 64 }),
  vpg: Vpg,
  vms: Type.Array(Type.String(), { maxItems: 1000 }),
  atUnixMs: Type.Number(),
  kind: Type.Union([Type.Literal('automatic'), Type.Literal('tagged'), Type.Literal('quiesced')]),
  tag: Type.Optional(Type.String({ maxLength: 200 })),
})

const asks = {
  hold: Type.Object({ vpg: Vpg, cutId: CutId, holdMs: Type.Number({ minimum: 1, maximum: 1000 }) }),
  commit: Type.Object({ vpg: Vpg, cutId: CutId, mark: Mark }),
  release: Type.Object({ vpg: Vpg, cutId: CutId }),
  status: Type.Object({}),
  tag: Type.Object({ vpg: Vpg, tag: Type.String({ minLength: 1, maxLength: 200 }) }),
}
const Refused = Type.Object({ refused: Type.String(), retry: Type.Optional(Type.Boolean()) })
/** What a node knows of its members of a group. */
export const MemberReport = Type.Object({ name: Vpg, vms: Type.Array(VmStatus), lastValid: Type.Optional(Checkpoint), abandonedCuts: Type.Number() })
const answers = {
  hold: Type.Union([Type.Object({ held: Type.Array(Type.Number()) }), Refused]),
  commit: Type.Union([Type.Object({ committed: Type.Array(Type.Number()) }), Refused]),
  release: Type.Object({}),
  status: Type.Object({ vpgs: Type.Array(MemberReport) }),
  tag: Checkpoint,
}

export type NodeAskName = keyof typeof asks
export type NodeAsk<Name extends NodeAskName> = Static<(typeof asks)[Name]>
export type NodeAnswer<Name extends NodeAskName> = Static<(typeof answers)[Name]>
/** How a node answers the others. `from` is the name of the node that asks. */
export type NodeHandlers = { [Name in NodeAskName]: (ask: NodeAsk<Name>, from: string) => Promise<NodeAnswer<Name>> }

export type NodeRequest = { [Name in NodeAskName]: { id: number; name: Name; ask: NodeAsk<Name> } }[NodeAskName]
export type NodeReply = { id: number; answer: unknown } | { id: number; error: { code: string; message: string; hint?: string } }

export const encodeMessage = (message: object): Buffer => {
  const text = JSON.stringify(message)
  const bodyBytes = Buffer.byteLength(text)
  if (bodyBytes > MAX_BODY_BYTES) throw new CdpError('STREAM_PROTOCOL', 'a message to another node is too large', { context: { bodyBytes } })
  const buffer = Buffer.allocUnsafe(HEADER_BYTES + bodyBytes)
  buffer.writeUInt32LE(bodyBytes, 0)
  buffer.write(text, HEADER_BYTES, 'utf8')
  return buffer
}

/** @throws CdpError BAD_INPUT for a request that is not understood, with its id in the context; STREAM_PROTOCOL for what is no request */
export const readRequest = (message: unknown): NodeRequest => {
  const { id, name, ask } = message as { id?: unknown; name?: unknown; ask?: unknown }
  if (typeof id !== 'number' || typeof name !== 'string') throw new CdpError('STREAM_PROTOCOL', 'another node sent what is no request')
  if (!Object.hasOwn(asks, name) || !Value.Check(asks[name as NodeAskName], ask)) throw new CdpError('BAD_INPUT', `this node does not understand the request ${JSON.stringify(name.slice(0, 40))}`, { hint: 'Install the same version of pve-cdp on all nodes.', context: { id } })
  return { id, name, ask } as NodeRequest
}

/** @throws CdpError STREAM_PROTOCOL */
export const readReply = (message: unknown): NodeReply => {
  const { id, answer, error } = message as { id?: unknown; answer?: unknown; error?: { code?: unknown; message?: unknown; hint?: unknown } }
  if (typeof id === 'number' && typeof error?.code === 'string' && typeof error.message === 'string') {
    return { id, error: { code: error.code, message: error.message, ...(typeof error.hint === 'string' ? { hint: error.hint } : {}) } }
  }
  if (typeof id !== 'number' || answer === undefined) throw new CdpError('STREAM_PROTOCOL', 'another node sent what is no answer')
  return { id, answer }
}

/** @throws CdpError STREAM_PROTOCOL if it is not an answer to that */
export const checkAnswer = <Name extends NodeAskName>(name: Name, answer: unknown): NodeAnswer<Name> => {
  if (!Value.Check(answers[name], answer)) throw new CdpError('STREAM_PROTOCOL', `another node sent a strange answer to ${name}`, { hint: 'Install the same version of pve-cdp on all nodes.' })
  return answer
}

/** Cuts bytes into messages. No I/O. @throws from push: CdpError STREAM_PROTOCOL; unusable afterwards */
export class NodeMessageParser {
  readonly #onMessage: (message: unknown) => void
  readonly #header = Buffer.alloc(HEADER_BYTES)
  #headerBytes = 0
  #body: Buffer | undefined
  #bodyBytes = 0

  constructor(onMessage: (message: unknown) => void) {
    this.#onMessage = onMessage
  }

  push(chunk: Buffer): void {
    let at = 0
    while (at < chunk.length) {
      if (this.#body === undefined) {
        const take = Math.min(HEADER_BYTES - this.#headerBytes, chunk.length - at)
        chunk.copy(this.#header, this.#headerBytes, at, at + take)
        this.#headerBytes += take
        at += take
        if (this.#headerBytes < HEADER_BYTES) return
        const bodyBytes = this.#header.readUInt32LE(0)
        if (bodyBytes === 0 || bodyBytes > MAX_BODY_BYTES) throw new CdpError('STREAM_PROTOCOL', 'another node sent a message of impossible length', { context: { bodyBytes } })
        this.#body = Buffer.allocUnsafe(bodyBytes)
        this.#bodyBytes = 0
      }
      const body = this.#body
      const take = Math.min(body.length - this.#bodyBytes, chunk.length - at)
      chunk.copy(body, this.#bodyBytes, at, at + take)
      this.#bodyBytes += take
      at += take
      if (this.#bodyBytes < body.length) return
      this.#body = undefined
      this.#headerBytes = 0
      this.#onMessage(parseObject(body))
    }
  }
}

const parseObject = (body: Buffer): object => {
  let value: unknown
  try {
    value = JSON.parse(body.toString('utf8'))
  } catch (cause) {
    throw new CdpError('STREAM_PROTOCOL', 'another node sent what is not JSON', { cause })
  }
  if (typeof value !== 'object' || value === null) throw new CdpError('STREAM_PROTOCOL', 'another node sent what is no object')
  return value
}
