import { Socket } from 'node:net'
import type { Duplex } from 'node:stream'
import { CdpError } from '../errors/index.ts'

export type Reading = {
  /** Asked before each read: where the next bytes go; never empty. */
  nextBuffer: () => Buffer
  /** So many bytes are in the buffer given last. What it throws ends the connection with that error. */
  onRead: (lengthBytes: number) => void
}

/** Node's names for what `onread` sets on a socket, and the one call of its handle that goes with them. */
type Internals = { buffer: symbol; callback: symbol; generator: symbol }
type Handle = { useUserBuffer?: (buffer: Uint8Array) => void }
type WithInternals = Record<symbol, unknown> & { _handle?: Handle | null }

/** Taken from a socket that Node made with `onread`; undefined if this Node has none of these names. */
const internals = ((): Internals | undefined => {
  const socket = new Socket({ onread: { buffer: () => Buffer.alloc(1), callback: () => true } })
  const symbols = Object.getOwnPropertySymbols(socket)
  const [buffer, callback, generator] = ['kBuffer', 'kBufferCb', 'kBufferGen'].map((name) => symbols.find(({ description }) => description === name))
  socket.destroy()
  return buffer && callback && generator && { buffer, callback, generator }
})()

/**
 * Reads a connection into buffers of ours: nothing is allocated per read, and a payload is read where it will stay. For accepted and for
 * TLS sockets, for which Node offers no `onread`, although all of its sockets can do it: what its constructor sets is set later here. The
 * runtime is pinned, and a test holds this. Any other stream, or a Node that has changed, is read as 'data' and copied: the same, slower.
 * Afterwards the socket flows; `pause` and `resume` work as ever.
 * @returns true if the kernel (or TLS) writes straight into the buffers
 */
export const readInto = (stream: Duplex, { nextBuffer, onRead }: Reading): boolean => {
  const take = (chunk: Buffer): void => {
    for (let at = 0; at < chunk.length; ) {
      const buffer = nextBuffer()
      const lengthBytes = chunk.copy(buffer, 0, at)
      if (lengthBytes === 0) throw new CdpError('INTERNAL', 'nowhere to read to')
      onRead(lengthBytes)
      at += lengthBytes
    }
  }
  const guarded = (work: () => void): void => {
    if (stream.destroyed) return
    try {
      work()
    } catch (error) {
      stream.destroy(Error.isError(error) ? error : new CdpError('INTERNAL', String(error)))
    }
  }
  // What came before now stands in the stream's own buffer, and comes as 'data'.
  stream.on('data', (chunk: Buffer) => guarded(() => take(chunk)))
  const socket = stream as unknown as WithInternals
  const handle = stream instanceof Socket ? socket._handle : undefined
  const direct = internals !== undefined && typeof handle?.useUserBuffer === 'function'
  if (direct) {
    const first = nextBuffer()
    socket[internals.buffer] = first
    socket[internals.generator] = nextBuffer
    socket[internals.callback] = (lengthBytes: number): boolean => {
      guarded(() => onRead(lengthBytes))
      return true
    }
    handle.useUserBuffer?.(first)
  }
  stream.resume()
  return direct
}
