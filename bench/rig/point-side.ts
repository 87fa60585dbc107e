import { fork, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { CdpError } from '../../core/errors/index.ts'
import type { PointAnswer, PointRequest } from './point-process.ts'

type Answered = Extract<PointAnswer, { uri: string }>

/** The bench's handle of a process that serves recovery points (point-process.ts). */
export class PointSide implements AsyncDisposable {
  readonly #child: ChildProcess
  readonly #waiting = new Map<number, { resolve: (answer: Answered) => void; reject: (error: CdpError) => void }>()
  #nextId = 1

  private constructor(child: ChildProcess) {
    this.#child = child
    child.on('message', (message: PointAnswer) => {
      if ('ready' in message) return
      const waiting = this.#waiting.get(message.id)
      this.#waiting.delete(message.id)
      if ('error' in message) waiting?.reject(new CdpError('INTERNAL', message.error))
      else waiting?.resolve(message)
    })
    child.on('exit', () => {
      for (const { reject } of this.#waiting.values()) reject(new CdpError('CLOSED', 'the process that serves points ended'))
    })
  }

  static async start(socketPath: string): Promise<PointSide> {
    const child = fork(new URL('./point-process.js', import.meta.url), [socketPath], { stdio: ['ignore', 'inherit', 'inherit', 'ipc'] })
    const side = new PointSide(child)
    await once(child, 'message')
    return side
  }

  ask(request: PointRequest): Promise<Answered> {
    const id = this.#nextId++
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject })
      this.#child.send({ ...request, id }, (error) => {
        if (error !== null) reject(new CdpError('CLOSED', 'the process that serves points is gone', { cause: error }))
      })
    })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return
    const ended = once(this.#child, 'exit')
    this.#child.disconnect()
    const timer = setTimeout(() => this.#child.kill('SIGKILL'), 5_000)
    await ended
    clearTimeout(timer)
  }
}
