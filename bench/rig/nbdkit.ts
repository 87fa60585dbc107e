import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, rmSync } from 'node:fs'
import { connect, createServer, type AddressInfo } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { CdpError } from '../../core/errors/index.ts'

const START_DEADLINE_MS = 10_000

/** An nbdkit server: the C program that ours is held against. */
export class Nbdkit implements AsyncDisposable {
  /** Of a server on a unix socket. */
  readonly socketPath: string
  /** Of a server on loopback. */
  readonly port: number
  readonly pid: number
  readonly #child: ChildProcess

  private constructor(child: ChildProcess, socketPath: string, port: number) {
    this.#child = child
    this.pid = child.pid ?? 0
    this.socketPath = socketPath
    this.port = port
  }

  /** On a unix socket in `directory`. */
  static async start(directory: string, ...args: string[]): Promise<Nbdkit> {
    const socketPath = `${directory}/nbdkit.sock`
    // One that was killed leaves its socket.
    rmSync(socketPath, { force: true })
    return Nbdkit.#start(['-U', socketPath, ...args], async () => existsSync(socketPath), socketPath, 0)
  }

  /** On a port of loopback, over TLS with client certificates. */
  static async startTls(tlsDirectory: string, ...args: string[]): Promise<Nbdkit> {
    const port = await freePort()
    return Nbdkit.#start(['-i', '127.0.0.1', '-p', String(port), '--tls=require', `--tls-certificates=${tlsDirectory}`, '--tls-verify-peer', ...args], () => answers(port), '', port)
  }

  static async #start(args: readonly string[], isUp: () => Promise<boolean>, socketPath: string, port: number): Promise<Nbdkit> {
    const child = spawn('nbdkit', ['-f', '--exit-with-parent', ...args], { stdio: ['ignore', 'ignore', 'inherit'] })
    const untilMs = performance.now() + START_DEADLINE_MS
    while (!(await isUp())) {
      if (child.exitCode !== null || performance.now() > untilMs) {
        child.kill('SIGKILL')
        throw new CdpError('IO', `nbdkit ${args.join(' ')} does not serve`)
      }
      await delay(20)
    }
    return new Nbdkit(child, socketPath, port)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return
    const ended = once(this.#child, 'exit')
    this.#child.kill('SIGKILL')
    await ended
  }
}

const freePort = async (): Promise<number> => {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}

const answers = async (port: number): Promise<boolean> => {
  const socket = connect(port, '127.0.0.1')
  try {
    await once(socket, 'connect')
    return true
  } catch {
    return false // nobody listens yet
  } finally {
    socket.destroy()
  }
}
