import type { Duplex } from 'node:stream'
import type { Static, TSchema } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'
import { CdpError, errorMessage } from '../errors/index.ts'

const maxMessageBytes = 16_384
const headerBytes = 4

/** Writes one message; the caller ends the socket. */
export const sendMessage = (socket: Duplex, message: object): void => {
  const body = Buffer.from(JSON.stringify(message))
  if (body.length > maxMessageBytes) throw new CdpError('INTERNAL', `a pairing message of ${body.length} bytes`)
  const header = Buffer.alloc(headerBytes)
  header.writeUInt32BE(body.length)
  socket.write(header)
  socket.write(body)
}

/**
 * Reads one message and checks it against `schema`. Undefined if the peer closed without a byte.
 * Throws STREAM_PROTOCOL (not a message), CLOSED (cut off), TIMEOUT, ABORTED.
 */
export const receiveMessage = async <S extends TSchema>(
  socket: Duplex,
  schema: S,
  options: { deadlineMs: number; signal?: AbortSignal },
): Promise<Static<S> | undefined> => {
  const body = await receiveBody(socket, options)
  if (body === undefined) return undefined
  let message: unknown
  try {
    message = JSON.parse(body.toString('utf8'))
  } catch (error) {
    throw new CdpError('STREAM_PROTOCOL', 'the peer sent a pairing message that is no JSON', { cause: error })
  }
  if (!Value.Check(schema, message)) {
    throw new CdpError('STREAM_PROTOCOL', `the peer sent a pairing message that is not understood (${Value.Errors(schema, message).First()?.path ?? ''})`, {
      hint: 'Do both sites run the same version?',
    })
  }
  return message
}

const receiveBody = async (socket: Duplex, options: { deadlineMs: number; signal?: AbortSignal }): Promise<Buffer | undefined> => {
  const deadline = AbortSignal.timeout(options.deadlineMs)
  const signal = options.signal === undefined ? deadline : AbortSignal.any([deadline, options.signal])
  const { promise, resolve, reject } = Promise.withResolvers<Buffer | undefined>()
  const received = Buffer.alloc(headerBytes + maxMessageBytes)
  let receivedBytes = 0
  const onData = (chunk: Buffer): void => {
    if (receivedBytes + chunk.length > received.length) return reject(new CdpError('STREAM_PROTOCOL', 'the peer sent more than a pairing message'))
    chunk.copy(received, receivedBytes)
    receivedBytes += chunk.length
    if (receivedBytes < headerBytes) return
    const bodyBytes = received.readUInt32BE()
    if (bodyBytes > maxMessageBytes) return reject(new CdpError('STREAM_PROTOCOL', `the peer announced a pairing message of ${bodyBytes} bytes`))
    if (receivedBytes > headerBytes + bodyBytes) return reject(new CdpError('STREAM_PROTOCOL', 'the peer sent more than one pairing message'))
    if (receivedBytes === headerBytes + bodyBytes) resolve(received.subarray(headerBytes, receivedBytes))
  }
  const onEnd = (): void =>
    receivedBytes === 0 ? resolve(undefined) : reject(new CdpError('CLOSED', 'the peer closed in the middle of a pairing message', { retry: true }))
  const onError = (error: Error): void => reject(new CdpError('CLOSED', `the connection broke: ${errorMessage(error)}`, { cause: error, retry: true }))
  const onAbort = (): void =>
    reject(
      deadline.aborted
        ? new CdpError('TIMEOUT', `no pairing message within ${options.deadlineMs} ms`, { retry: true })
        : new CdpError('ABORTED', 'the pairing was given up'),
    )
  if (signal.aborted) onAbort()
  if (socket.destroyed) onEnd()
  signal.addEventListener('abort', onAbort, { once: true })
  socket.on('data', onData).on('end', onEnd).on('close', onEnd).on('error', onError)
  try {
    return await promise
  } finally {
    signal.removeEventListener('abort', onAbort)
    socket.off('data', onData).off('end', onEnd).off('close', onEnd).off('error', onError)
  }
}
