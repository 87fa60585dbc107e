import { connect, type Socket } from 'node:net'
import { CdpError } from '../../core/errors/index.ts'
import { withDeadline } from './process.ts'

type Message = { QMP?: unknown; return?: unknown; error?: { class: string; desc: string }; id?: number; event?: string; data?: Record<string, unknown> }
export type MonitorEvent = { name: string; data: Record<string, unknown> }

/**
 * A QMP conversation of the lab with its own QEMU, over a monitor of its own (Proxmox's ID.qmp is left to the programs under test).
 * Small on purpose and independent of core/qmp: the lab must not fail together with what it tests.
 */
export class Monitor {
  readonly #socket: Socket
  readonly #waiting = new Map<number, { resolve: (value: unknown) => void; reject: (error: CdpError) => void }>()
  readonly #listeners = new Set<(event: MonitorEvent) => void>()
  #greeted: (() => void) | undefined
  #rest = ''
  #nextId = 1
  #closed = false

  private constructor(socket: Socket) {
    this.#socket = socket
    socket.setEncoding('utf8')
    socket.on('data', (text: string) => this.#take(text))
    socket.on('error', () => socket.destroy()) // 'close' follows and ends what waits
    socket.on('close', () => {
      this.#closed = true
      for (const { reject } of this.#waiting.values()) reject(new CdpError('CLOSED', 'QEMU closed its monitor'))
      this.#waiting.clear()
    })
  }

  /** Connects and negotiates. CLOSED if nobody listens. */
  static async open(path: string, deadlineMs = 5_000): Promise<Monitor> {
    const socket = connect(path)
    const monitor = new Monitor(socket)
    const greeting = new Promise<void>((resolve, reject) => {
      monitor.#greeted = resolve
      socket.once('error', (cause) => reject(new CdpError('CLOSED', `no monitor at ${path}: ${cause.message}`, { cause })))
    })
    try {
      await withDeadline(greeting, deadlineMs, `greeting of ${path}`)
      await monitor.run('qmp_capabilities', {}, deadlineMs)
      return monitor
    } catch (error) {
      socket.destroy()
      throw error
    }
  }

  /** The `return` of a command; QMP_COMMAND with QEMU's text if it refuses, CLOSED if it goes away, TIMEOUT. */
  async run(command: string, args: Record<string, unknown> = {}, deadlineMs = 10_000): Promise<unknown> {
    if (this.#closed) throw new CdpError('CLOSED', 'QEMU closed its monitor')
    const id = this.#nextId++
    const answer = new Promise<unknown>((resolve, reject) => this.#waiting.set(id, { resolve, reject }))
    this.#socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\n`)
    return withDeadline(answer, deadlineMs, `QMP ${command}`)
  }

  /** Calls `listener` for each event until the returned function is called. */
  onEvent(listener: (event: MonitorEvent) => void): () => void {
    this.#listeners.add(listener)
    return () => this.#listeners.delete(listener)
  }

  close(): void {
    this.#socket.destroy()
  }

  #take(text: string): void {
    this.#rest += text
    for (let end = this.#rest.indexOf('\n'); end >= 0; end = this.#rest.indexOf('\n')) {
      const line = this.#rest.slice(0, end)
      this.#rest = this.#rest.slice(end + 1)
      if (line.trim() !== '') this.#dispatch(JSON.parse(line) as Message)
    }
  }

  #dispatch(message: Message): void {
    if (message.QMP !== undefined) return this.#greeted?.()
    if (message.event !== undefined) {
      for (const listener of this.#listeners) listener({ name: message.event, data: message.data ?? {} })
      return
    }
    const waiter = message.id === undefined ? undefined : this.#waiting.get(message.id)
    if (!waiter) return
    this.#waiting.delete(message.id!)
    if (message.error) waiter.reject(new CdpError('QMP_COMMAND', message.error.desc))
    else waiter.resolve(message.return)
  }
}
