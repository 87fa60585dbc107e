import { CdpError } from '../errors/index.ts'
import { asObject, countField, objectField, optionalField, stringField } from './shape.ts'
import type { JsonObject } from './shape.ts'

export type QmpVersion = { major: number; minor: number; micro: number; package: string }

export type QmpGreeting = { is: 'greeting'; version: QmpVersion }
export type QmpEvent = { is: 'event'; event: string; data: JsonObject; atUnixMs: number }
export type QmpMessage =
  | QmpGreeting
  | QmpEvent
  /** `id` as it was sent with the command; undefined when it was no string, or when QEMU could not read the command at all. */
  | { is: 'return'; id: string | undefined; value: unknown }
  | { is: 'error'; id: string | undefined; errorClass: string; desc: string }

const newline = 0x0a

/** Reads `{qemu: {major, minor, micro}, package}`, as in the greeting and in the answer to query-version. */
export const readVersion = (value: JsonObject): QmpVersion => {
  const qemu = objectField(value, 'qemu')
  return { major: countField(qemu, 'major'), minor: countField(qemu, 'minor'), micro: countField(qemu, 'micro'), package: optionalField(value, 'package', stringField) ?? '' }
}

const readId = ({ id }: JsonObject): string | undefined => (typeof id === 'string' ? id : undefined)

const readMessage = (line: string): QmpMessage => {
  let parsed: unknown
  try {
    parsed = JSON.parse(line)
  } catch (cause) {
    throw new CdpError('QMP_PROTOCOL', 'The QMP peer sent a line that is not JSON', { cause, context: { start: line.slice(0, 80) } })
  }
  const object = asObject(parsed, 'a QMP message')
  if ('QMP' in object) return { is: 'greeting', version: readVersion(objectField(objectField(object, 'QMP'), 'version')) }
  if ('event' in object) {
    const at = objectField(object, 'timestamp')
    const seconds = at['seconds']
    const microseconds = at['microseconds']
    const known = typeof seconds === 'number' && typeof microseconds === 'number' && seconds >= 0
    return {
      is: 'event',
      event: stringField(object, 'event'),
      data: optionalField(object, 'data', objectField) ?? {},
      atUnixMs: known ? seconds * 1000 + Math.floor(microseconds / 1000) : 0,
    }
  }
  if ('return' in object) return { is: 'return', id: readId(object), value: object['return'] }
  if ('error' in object) {
    const error = objectField(object, 'error')
    return { is: 'error', id: readId(object), errorClass: stringField(error, 'class'), desc: stringField(error, 'desc') }
  }
  throw new CdpError('QMP_PROTOCOL', 'The QMP peer sent a message of no known kind', { context: { start: line.slice(0, 80) } })
}

/**
 * The protocol without I/O: bytes in any chunking, messages out in order (QEMU, docs/interop/qmp-spec.rst).
 * A line longer than `maxLineBytes` is refused before it is stored. After an error the parser is of no further use.
 */
export class QmpParser {
  readonly #maxLineBytes: number
  #pieces: Uint8Array[] = []
  #pendingBytes = 0

  constructor(maxLineBytes = 16 * 1024 * 1024) {
    this.#maxLineBytes = maxLineBytes
  }

  /** @throws CdpError QMP_PROTOCOL for a line that is too long, no JSON or no QMP. Messages before it were handed over. */
  push(chunk: Uint8Array, onMessage: (message: QmpMessage) => void): void {
    let startOffset = 0
    for (let endOffset = chunk.indexOf(newline); endOffset >= 0; endOffset = chunk.indexOf(newline, startOffset)) {
      this.#keep(chunk.subarray(startOffset, endOffset))
      startOffset = endOffset + 1
      const line = Buffer.concat(this.#pieces, this.#pendingBytes).toString('utf8').trim()
      this.#pieces = []
      this.#pendingBytes = 0
      if (line.length > 0) onMessage(readMessage(line))
    }
    if (startOffset < chunk.length) this.#keep(chunk.subarray(startOffset))
  }

  #keep(piece: Uint8Array): void {
    if (this.#pendingBytes + piece.length > this.#maxLineBytes) {
      throw new CdpError('QMP_PROTOCOL', `The QMP peer sent a line of more than ${this.#maxLineBytes} bytes`, { context: { maxLineBytes: this.#maxLineBytes } })
    }
    this.#pieces.push(piece)
    this.#pendingBytes += piece.length
  }
}
