import { createServer } from 'node:net'
import type { Server, Socket } from 'node:net'
import { rm } from 'node:fs/promises'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { readInto } from '../../core/link/index.ts'
import type { Reading } from '../../core/link/index.ts'
import * as nbd from '../../core/nbd/index.ts'
import { CaptureConnection, MAX_WRITE_BYTES } from './connection.ts'
import type { CapturedDisk, ConnectionHost } from './connection.ts'

export type TargetEvents = {
  /** QEMU (or a handshake check) entered the transmission phase. */
  opened(key: string): void
  /** That connection is gone. Clean: it said NBD_CMD_DISC between two requests, and none was refused. */
  closed(key: string, clean: boolean, why: string): void
}

const HANDSHAKE_DEADLINE_MS = 5_000
/** What one read from a socket may bring; more than a unix socket usually holds. */
const SCRATCH_BYTES = 256 * 1024

/**
 * The NBD target of one VM: a unix socket, one export per disk, named by the disk's key. It only takes: reads are refused.
 * Closing a connection is how capture lets go: QEMU stops the job and the guest goes on.
 */
export class CaptureTarget implements AsyncDisposable {
  readonly #path: string
  readonly #disks: readonly CapturedDisk[]
  readonly #host: ConnectionHost
  readonly #events: TargetEvents
  readonly #connections = new Map<Socket, CaptureConnection>()
  readonly #sockets = new Set<Socket>()
  #server: Server | undefined
  /** False: whoever connects is sent away. A job that lost its target tries to connect again with each write of its guest, until it is taken away. */
  accepting = true

  constructor(options: { path: string; disks: readonly CapturedDisk[]; host: ConnectionHost; events: TargetEvents }) {
    this.#path = options.path
    this.#disks = options.disks
    this.#host = options.host
    this.#events = options.events
  }

  async listen(): Promise<void> {
    await rm(this.#path, { force: true })
    const server = createServer({ pauseOnConnect: true }, (socket) => this.#negotiate(socket))
    this.#server = server
    const { promise, resolve, reject } = Promise.withResolvers<void>()
    server.once('error', reject)
    server.listen(this.#path, resolve)
    await promise
    server.off('error', reject)
    // A connection that could not be accepted (no file left) is QEMU's to try again; it must not end the thread.
    server.on('error', (error) => process.emitWarning(`capture target: ${errorMessage(error)}`, { code: 'CDP_CAPTURE_TARGET' }))
  }

  /** Ends every connection at once: the guest goes on, QEMU's dirty bitmap remembers what is missed from here on. */
  letGo(): void {
    for (const socket of this.#sockets) socket.destroy()
  }

  /** Sends the acknowledgements that a group cut held back. */
  releaseHeld(): void {
    for (const connection of this.#connections.values()) connection.releaseHeld()
  }

  /** The longest time that half a request has waited for its rest. */
  stalledMs(nowMs: number): number {
    let longestMs = 0
    for (const connection of this.#connections.values()) longestMs = Math.max(longestMs, connection.stalledMs(nowMs))
    return longestMs
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.letGo()
    const server = this.#server
    this.#server = undefined
    if (server === undefined) return
    await new Promise<void>((resolve) => server.close(() => resolve()))
    await rm(this.#path, { force: true })
  }

  #exportOf(key: string): nbd.HandshakeExport | undefined {
    const disk = this.#disks.find((candidate) => candidate.key === key)
    return disk && {
      name: key,
      sizeBytes: disk.sizeBytes,
      transmissionFlags: nbd.NBD_FLAG_HAS_FLAGS | nbd.NBD_FLAG_SEND_FLUSH | nbd.NBD_FLAG_SEND_FUA | nbd.NBD_FLAG_SEND_TRIM | nbd.NBD_FLAG_SEND_WRITE_ZEROES,
      blockSize: { minBytes: 512, preferredBytes: 4096, maxBytes: MAX_WRITE_BYTES },
      metaContexts: [],
    }
  }

  #negotiate(socket: Socket): void {
    if (!this.accepting) return void socket.destroy()
    let why = 'closed by the peer'
    let connection: CaptureConnection | undefined
    let place: Buffer | undefined
    const scratch = Buffer.allocUnsafeSlow(SCRATCH_BYTES)
    const handshake = new nbd.ServerHandshake({ findExport: (name) => this.#exportOf(name), listExports: () => this.#disks.map(({ key }) => ({ name: key })), structuredReplies: false })
    const receive = (lengthBytes: number): void => {
      if (connection === undefined) {
        const { send, outcome } = handshake.push(scratch.subarray(0, lengthBytes))
        for (const bytes of send) socket.write(bytes)
        if (outcome === undefined) return
        clearTimeout(deadline)
        if (outcome.is === 'aborted') return void socket.end()
        connection = this.#transmit(socket, outcome.session.exportName, () => why)
        connection.receive(outcome.rest, outcome.rest.length)
      } else if (place !== undefined) {
        connection.receivePlaced(lengthBytes)
      } else {
        connection.receive(scratch, lengthBytes)
      }
      if (connection.saidGoodbye) socket.end()
    }
    const reading: Reading = {
      nextBuffer: () => (place = connection?.placeForPayload()) ?? scratch,
      onRead: (lengthBytes) => {
        try {
          receive(lengthBytes)
        } catch (error) {
          why = errorMessage(error)
          socket.destroy()
        }
      },
    }
    const deadline = setTimeout(() => socket.destroy(), HANDSHAKE_DEADLINE_MS)
    this.#sockets.add(socket)
    socket.on('error', (error) => (why = errorMessage(error)))
    socket.once('close', () => {
      this.#sockets.delete(socket)
      clearTimeout(deadline)
    })
    readInto(socket, reading)
    socket.write(handshake.greeting())
  }

  #transmit(socket: Socket, key: string, whyClosed: () => string): CaptureConnection {
    const disk = this.#disks.find((candidate) => candidate.key === key)
    if (disk === undefined) throw new CdpError('INTERNAL', 'negotiated an export that does not exist')
    const connection = new CaptureConnection(socket, disk, this.#host)
    this.#connections.set(socket, connection)
    socket.once('close', () => {
      this.#connections.delete(socket)
      this.#events.closed(key, connection.endedCleanly && !connection.refused, connection.refused ? 'a request was refused' : whyClosed())
    })
    this.#events.opened(key)
    return connection
  }
}
