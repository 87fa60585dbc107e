import { Socket } from 'node:net'
import { CdpError } from '../../core/errors/index.ts'

export type Reading = {
  /** Asked before each read: where the kernel puts what it has. */
  nextBuffer: () => Buffer
  /** So many bytes are in the buffer given last. */
  onRead: (lengthBytes: number) => void
}

/**
 * Takes over an accepted, paused connection so that its bytes are read into buffers of ours: nothing is allocated per read and a large
 * payload is not copied a second time. Node offers this (`onread`) for sockets it makes, and gives no public way to make one around a
 * connection that a server accepted; the handle is handed on under its internal name. The runtime is pinned, and a test holds this.
 */
export const readInto = (accepted: Socket, { nextBuffer, onRead }: Reading): Socket => {
  const donor = accepted as unknown as { _handle: object | null }
  const handle = donor._handle
  if (handle === null) throw new CdpError('CLOSED', 'the connection has ended already')
  donor._handle = null
  const options = {
    handle,
    onread: {
      buffer: nextBuffer,
      callback: (lengthBytes: number) => {
        onRead(lengthBytes)
        return true
      },
    },
  }
  const socket = new Socket(options as ConstructorParameters<typeof Socket>[0])
  // The server counts the socket that it accepted: its close would wait for that one for ever.
  socket.once('close', () => accepted.destroy())
  socket.resume()
  return socket
}
