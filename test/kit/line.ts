import { once } from 'node:events'
import { connect, createServer } from 'node:net'
import type { AddressInfo, Server, Socket } from 'node:net'

/** A line to a port of this machine that can be cut and mended. */
export class Line implements AsyncDisposable {
  readonly #sockets = new Set<Socket>()
  readonly #toPort: number
  #server: Server | undefined
  port = 0

  private constructor(toPort: number) {
    this.#toPort = toPort
  }

  static async to(port: number): Promise<Line> {
    const line = new Line(port)
    await line.mend()
    return line
  }

  async mend(): Promise<void> {
    this.#server = createServer((socket) => {
      const onward = connect(this.#toPort, '127.0.0.1')
      for (const [one, other] of [[socket, onward], [onward, socket]]) {
        this.#sockets.add(one)
        one.pipe(other)
        one.on('error', () => other.destroy()).on('close', () => other.destroy() && this.#sockets.delete(one))
      }
    }).listen(this.port, '127.0.0.1')
    await once(this.#server, 'listening')
    this.port = (this.#server.address() as AddressInfo).port
  }

  async cut(): Promise<void> {
    const server = this.#server
    if (server === undefined) return
    this.#server = undefined
    const closed = once(server, 'close')
    server.close()
    for (const socket of this.#sockets) socket.destroy()
    await closed
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.cut()
  }
}
