import { spawn, type ChildProcess } from 'node:child_process'
import { setTimeout as delay } from 'node:timers/promises'
import { existsSync } from 'node:fs'

/** An nbdkit server on a unix socket: the C target that capture is held against. */
export class Nbdkit implements AsyncDisposable {
  readonly socketPath: string
  readonly #child: ChildProcess

  private constructor(child: ChildProcess, socketPath: string) {
    this.#child = child
    this.socketPath = socketPath
  }

  static async start(directory: string, ...args: string[]): Promise<Nbdkit> {
    const socketPath = `${directory}/nbdkit.sock`
    const child = spawn('nbdkit', ['-f', '--exit-with-parent', '-U', socketPath, ...args], { stdio: ['ignore', 'ignore', 'inherit'] })
    while (!existsSync(socketPath)) await delay(20)
    return new Nbdkit(child, socketPath)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#child.kill('SIGKILL')
  }
}
