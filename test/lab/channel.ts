import { createHash, randomBytes } from 'node:crypto'
import { connect, type Socket } from 'node:net'
import { CdpError, errorMessage } from '../../core/errors/index.ts'

export type CommandResult = { exitCode: number; stdout: string; stderr: string }
/** A script that runs in the guest. */
export type GuestJob = {
  id: string
  /** Its end; rejects with CLOSED if the guest or the connection goes away before. */
  ended: Promise<CommandResult>
}

type Running = { stdout: string[]; stderr: string[]; started: boolean; heardAtMs: number; resolve: (result: CommandResult) => void; reject: (error: CdpError) => void }

const pieceBytes = 1_500
const repeatAfterMs = 2_000
const askAfterMs = 5_000

/**
 * The host's end of the command channel (test/lab/guest/channel describes the lines). Pieces are sent one at a time and repeated until the guest has
 * acknowledged them, results are checked by their sums and asked for again: noise and a lost connection cost time only.
 */
export class GuestChannel {
  readonly #socket: Socket
  readonly #session = randomBytes(4).toString('hex')
  readonly #running = new Map<string, Running>()
  #acknowledged: { line: string; resolve: () => void } | undefined
  #sending: Promise<void> = Promise.resolve()
  #nextId = 1
  #rest = ''
  readonly #asking: NodeJS.Timeout
  #closed = false

  private constructor(socket: Socket) {
    this.#socket = socket
    this.#asking = setInterval(() => this.#askForLost(), askAfterMs).unref()
    socket.setEncoding('latin1')
    socket.on('data', (text: string) => this.#take(text))
    socket.on('error', () => socket.destroy()) // 'close' follows and ends what waits
    socket.on('close', () => {
      this.#closed = true
      clearInterval(this.#asking)
      for (const { reject } of this.#running.values()) reject(new CdpError('CLOSED', 'the guest went away'))
      this.#running.clear()
      this.#acknowledged?.resolve()
    })
  }

  /** Connects to ID.serial0. One client at a time; a second one waits until the first has gone. */
  static async open(path: string): Promise<GuestChannel> {
    const socket = connect(path)
    await new Promise<void>((resolve, reject) => {
      socket.once('connect', resolve)
      socket.once('error', (cause) => reject(new CdpError('CLOSED', `no guest at ${path}: ${errorMessage(cause)}`, { cause })))
    })
    const channel = new GuestChannel(socket)
    socket.write('\n')
    return channel
  }

  /** Runs a shell script in the guest and waits for its end. At the deadline it is killed there and TIMEOUT is thrown. */
  async run(script: string, { deadlineMs = 30_000 }: { deadlineMs?: number } = {}): Promise<CommandResult> {
    const job = this.start(script)
    let timer: NodeJS.Timeout | undefined
    const late = new Promise<never>((_resolve, reject) => {
      timer = setTimeout(() => {
        this.signal(job.id, 'KILL')
        this.#running.delete(job.id)
        reject(new CdpError('TIMEOUT', `in the guest: no end within ${deadlineMs} ms: ${script.slice(0, 200)}`))
      }, deadlineMs)
    })
    try {
      return await Promise.race([job.ended, late])
    } finally {
      clearTimeout(timer)
    }
  }

  /** Starts a shell script in the guest and leaves it running. Its output so far is in jobDir(id)/out. */
  start(script: string): GuestJob {
    const id = `${this.#session}x${(this.#nextId++).toString(36)}`
    const ended = new Promise<CommandResult>((resolve, reject) => {
      if (this.#closed) reject(new CdpError('CLOSED', 'the guest went away'))
      else this.#running.set(id, { stdout: [], stderr: [], started: false, heardAtMs: 0, resolve, reject })
    })
    ended.catch(() => undefined) // whoever awaits it sees it; a job nobody waits for is no unhandled rejection
    const text = Buffer.from(script).toString('base64')
    const total = Math.max(1, Math.ceil(text.length / pieceBytes))
    for (let n = 1; n <= total; n++) {
      const data = text.slice((n - 1) * pieceBytes, n * pieceBytes)
      this.#sending = this.#sending.then(() => this.#sendPiece(`> ${id} ${n} ${total} ${data.length} ${data}`, `< ${id} A ${n}`))
    }
    this.#sending = this.#sending.then(() => this.#markStarted(id))
    return { id, ended }
  }

  /** Sends a signal to a job and all its children. */
  signal(id: string, name: 'TERM' | 'KILL' | 'STOP' | 'CONT'): GuestJob {
    return this.start(`kill -${name} -- -$(cat ${jobDir(id)}/pid)`)
  }

  close(): void {
    this.#socket.destroy()
  }

  async #sendPiece(line: string, acknowledgement: string): Promise<void> {
    if (this.#closed) return
    await new Promise<void>((resolve) => {
      const send = (): void => void (this.#socket.writable && this.#socket.write(`${line}\n`))
      const timer = setInterval(send, repeatAfterMs)
      this.#acknowledged = {
        line: acknowledgement,
        resolve: () => {
          clearInterval(timer)
          this.#acknowledged = undefined
          resolve()
        },
      }
      send()
    })
  }

  #markStarted(id: string): void {
    const job = this.#running.get(id)
    if (job) Object.assign(job, { started: true, heardAtMs: performance.now() })
  }

  /** The line that tells a job's end may have been lost in noise. */
  #askForLost(): void {
    for (const [id, job] of this.#running) if (job.started && performance.now() - job.heardAtMs > askAfterMs) this.#socket.write(`? ${id}\n`)
  }

  #take(text: string): void {
    const lines = (this.#rest + text).split('\n')
    this.#rest = lines.pop()!
    for (const line of lines) this.#takeLine(line.trimEnd())
  }

  #takeLine(line: string): void {
    if (line === this.#acknowledged?.line) return this.#acknowledged.resolve()
    const [mark, id = '', kind, data = '', outSum, errSum] = line.split(' ')
    const job = mark === '<' ? this.#running.get(id) : undefined
    if (!job) return
    job.heardAtMs = performance.now()
    if (kind === 'O') job.stdout.push(data)
    else if (kind === 'E') job.stderr.push(data)
    else if (kind === 'X') this.#finish(id, job, Number(data), outSum, errSum)
  }

  #finish(id: string, job: Running, exitCode: number, outSum: string | undefined, errSum: string | undefined): void {
    const [stdout, stderr] = [job.stdout, job.stderr].map((pieces) => Buffer.from(pieces.join(''), 'base64')) as [Buffer, Buffer]
    if (md5(stdout) !== outSum || md5(stderr) !== errSum) {
      job.stdout.length = job.stderr.length = 0
      this.#socket.write(`\n? ${id}\n`)
      return
    }
    this.#running.delete(id)
    this.#socket.write(`. ${id}\n`)
    job.resolve({ exitCode, stdout: stdout.toString(), stderr: stderr.toString() })
  }
}

/** Where the guest keeps a job: out, err, pid, and code once it has ended. */
export const jobDir = (id: string): string => `/run/lab/jobs/${id}`

const md5 = (bytes: Buffer): string => createHash('md5').update(bytes).digest('hex')
