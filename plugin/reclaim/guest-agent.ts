import { createConnection } from 'node:net'
import type { Socket } from 'node:net'
import { randomInt } from 'node:crypto'
import { CdpError, errorMessage } from '../../core/errors/index.ts'

/** Answers are small; more than this is no guest agent's. */
const MAX_ANSWER_BYTES = 1024 * 1024
/** The agent puts it before the answer to guest-sync-delimited, and we before the question: whatever was half said is over (QEMU, qga/qapi-schema.json). */
const DELIMITER = 0xff
const MAX_ID = 2 ** 31 - 1

type Answer = { return?: unknown; error?: { class?: string; desc?: string } }

/**
 * The guest agent of a VM, over its socket on the node, for one short conversation: the socket serves one client, and Proxmox is the other one. The guest is not
 * trusted: what it says is bounded, and every wait has a deadline.
 */
export class GuestAgent implements Disposable {
  readonly #socket: Socket
  #received = Buffer.alloc(0)
  #ended: CdpError | undefined
  #wake: (() => void) | undefined

  private constructor(socket: Socket) {
    this.#socket = socket
    socket.on('data', (chunk: Buffer) => {
      this.#received = Buffer.concat([this.#received, chunk])
      if (this.#received.length > MAX_ANSWER_BYTES) socket.destroy(new CdpError('IO', 'the guest agent says more than it may'))
      this.#wake?.()
    })
    socket.on('error', (error) => (this.#ended ??= new CdpError('IO', `the guest agent cannot be asked: ${errorMessage(error)}`, { cause: error, retry: true })))
    socket.on('close', () => {
      this.#ended ??= new CdpError('CLOSED', 'the connection to the guest agent has ended', { retry: true })
      this.#wake?.()
    })
  }

  /**
   * Resolves when the agent in the guest answers.
   * @throws CdpError TIMEOUT: no agent runs in the guest, or somebody else talks to it; IO, CLOSED
   */
  static async connect(path: string, deadlineMs: number): Promise<GuestAgent> {
    const agent = new GuestAgent(createConnection({ path }))
    try {
      await agent.#synchronise(deadlineMs)
      return agent
    } catch (error) {
      agent[Symbol.dispose]()
      throw error
    }
  }

  /** @throws CdpError IO: the guest refused, with its words; TIMEOUT, after which nothing more can be asked; CLOSED */
  async execute(command: string, args: Readonly<Record<string, unknown>>, deadlineMs: number): Promise<unknown> {
    this.#socket.write(`${JSON.stringify({ execute: command, arguments: args })}\n`)
    const answer = parse(await this.#line(performance.now() + deadlineMs, command))
    if (answer.error !== undefined) throw new CdpError('IO', `the guest agent refused ${command}: ${String(answer.error.desc)}`, { context: { command } })
    return answer.return
  }

  [Symbol.dispose](): void {
    this.#socket.destroy()
  }

  async #synchronise(deadlineMs: number): Promise<void> {
    const endMs = performance.now() + deadlineMs
    const id = randomInt(MAX_ID)
    this.#socket.write(Buffer.concat([Buffer.from([DELIMITER]), Buffer.from(`${JSON.stringify({ execute: 'guest-sync-delimited', arguments: { id } })}\n`)]))
    // Answers to what somebody asked before are behind the delimiter of ours.
    for (;;) {
      const line = await this.#line(endMs, 'guest-sync-delimited')
      const at = line.lastIndexOf(DELIMITER)
      if (at >= 0 && parse(line.subarray(at + 1)).return === id) return
    }
  }

  async #line(endMs: number, command: string): Promise<Buffer> {
    for (;;) {
      const at = this.#received.indexOf(0x0a)
      if (at >= 0) {
        const line = this.#received.subarray(0, at)
        this.#received = this.#received.subarray(at + 1)
        return line
      }
      if (this.#ended !== undefined) throw this.#ended
      const leftMs = endMs - performance.now()
      if (leftMs <= 0) throw new CdpError('TIMEOUT', `the guest agent does not answer to ${command}`, { retry: true, hint: 'Install and start qemu-guest-agent in the guest.' })
      await new Promise<void>((resolve) => {
        const timer = setTimeout(resolve, leftMs)
        this.#wake = () => {
          clearTimeout(timer)
          resolve()
        }
      })
    }
  }
}

const parse = (line: Buffer): Answer => {
  try {
    const answer: unknown = JSON.parse(line.toString('utf8'))
    return typeof answer === 'object' && answer !== null ? answer : {}
  } catch {
    return {}
  }
}
