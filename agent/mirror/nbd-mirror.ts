import { CdpError, errorCode, errorMessage, toCdpError } from '../../core/errors/index.ts'
import { NbdClient } from '../../core/nbd/index.ts'
import type { MirrorDisk } from './mirror-disk.ts'
import { NBD_SOCKET, withSocketPath } from './socket-path.ts'

/** What one request zeroes: storage that has to write zeroes must get done with it in time. */
const ZERO_BYTES = 256 * 1024 * 1024

export type NbdMirrorOptions = {
  directory: string
  disk: number
  /** Without any progress for so long, the storage hangs. */
  deadlineMs: number
  /** The daemon that serves it is not to be trusted any more. */
  onBroken: (why: string) => void
  /** Lets the storage be so large; nobody is connected to it meanwhile. */
  resize: (sizeBytes: number) => Promise<void>
}

/**
 * A mirror disk served by the storage daemon. It never connects again after an error: what it wrote may be lost with the daemon, and a flush on another
 * connection would say nothing about it.
 */
export class NbdMirror implements MirrorDisk {
  readonly lanes = 8
  readonly #options: NbdMirrorOptions
  #client: NbdClient
  #dirty = false
  #failure: CdpError | undefined
  #underWay = 0
  #progressAtMs = 0
  readonly #watch: NodeJS.Timeout
  #closed = false

  private constructor(options: NbdMirrorOptions, client: NbdClient) {
    this.#options = options
    this.#client = client
    this.#watch = setInterval(() => this.#look(), Math.max(10, options.deadlineMs / 4)).unref()
  }

  /** @throws CdpError UNREACHABLE, TIMEOUT, NBD_REFUSED */
  static async open(options: NbdMirrorOptions): Promise<NbdMirror> {
    try {
      return new NbdMirror(options, await connect(options))
    } catch (error) {
      if (errorCode(error) === 'TIMEOUT') options.onBroken('it takes no connection')
      throw error
    }
  }

  get sizeBytes(): number {
    return this.#client.sizeBytes
  }

  get dirty(): boolean {
    return this.#dirty
  }

  async write(offsetBytes: number, buffers: Buffer[], lengthBytes: number): Promise<void> {
    this.#check(offsetBytes, lengthBytes)
    if (lengthBytes === 0) return
    this.#dirty = true
    const data = buffers.length === 1 ? buffers[0] : gather(buffers, lengthBytes)
    await this.#run(this.#client.write(offsetBytes, data))
  }

  async zero(offsetBytes: number, lengthBytes: number): Promise<void> {
    this.#check(offsetBytes, lengthBytes)
    const endBytes = offsetBytes + lengthBytes
    for (let at = offsetBytes; at < endBytes; at += ZERO_BYTES) {
      this.#dirty = true
      await this.#run(this.#client.writeZeroes(at, Math.min(ZERO_BYTES, endBytes - at)))
    }
  }

  async read(offsetBytes: number, target: Buffer): Promise<void> {
    const lengthBytes = Math.max(0, Math.min(target.length, this.sizeBytes - offsetBytes))
    target.fill(0, lengthBytes)
    if (lengthBytes > 0) await this.#run(this.#client.readInto(target, 0, offsetBytes, lengthBytes))
  }

  async grow(sizeBytes: number): Promise<void> {
    if (sizeBytes <= this.sizeBytes) return
    await this.datasync()
    await this.#client[Symbol.asyncDispose]()
    try {
      await this.#options.resize(sizeBytes)
      this.#client = await connect(this.#options)
    } catch (error) {
      throw (this.#failure = toCdpError(error, 'IO'))
    }
  }

  async datasync(): Promise<void> {
    if (this.#failure !== undefined) throw this.#failure
    if (!this.#dirty) return
    try {
      await this.#run(this.#client.flush())
    } catch (error) {
      this.#options.onBroken(`a flush failed: ${errorMessage(error)}`)
      throw error
    }
    this.#dirty = false
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    clearInterval(this.#watch)
    await this.#client[Symbol.asyncDispose]()
  }

  async #run(request: Promise<unknown>): Promise<void> {
    if (this.#underWay++ === 0) this.#progressAtMs = performance.now()
    try {
      await request
    } catch (error) {
      this.#failure ??= failureOf(error, this.#options.disk)
      throw this.#failure
    } finally {
      this.#underWay--
      this.#progressAtMs = performance.now()
    }
  }

  #look(): void {
    const { disk, deadlineMs, onBroken } = this.#options
    if (this.#underWay === 0 || performance.now() - this.#progressAtMs < deadlineMs) return
    this.#failure ??= new CdpError('TIMEOUT', `the storage of the mirror of disk ${disk} does not answer`, { retry: true, hint: 'Look at the storage below the mirror.', context: { disk, deadlineMs } })
    onBroken(`no answer within ${deadlineMs} ms`)
    void this.#client[Symbol.asyncDispose]()
  }

  #check(offsetBytes: number, lengthBytes: number): void {
    if (this.#failure !== undefined) throw this.#failure
    const { sizeBytes } = this
    if (offsetBytes < 0 || lengthBytes < 0 || offsetBytes + lengthBytes > sizeBytes) {
      throw new CdpError('BAD_INPUT', 'access outside a mirror disk', { context: { offsetBytes, lengthBytes, sizeBytes } })
    }
  }
}

const connect = ({ directory, disk, deadlineMs }: NbdMirrorOptions): Promise<NbdClient> =>
  withSocketPath(directory, NBD_SOCKET, (path) => NbdClient.connect({ path }, { exportName: String(disk), deadlineMs }))

const gather = (buffers: readonly Buffer[], lengthBytes: number): Buffer => {
  const whole = Buffer.allocUnsafe(lengthBytes)
  let at = 0
  for (const buffer of buffers) at += buffer.copy(whole, at)
  return whole
}

const failureOf = (cause: unknown, disk: number): CdpError => {
  const error = toCdpError(cause, 'IO')
  if (error.context.errno === 'ENOSPC') {
    return new CdpError('IO', `the storage of the mirror of disk ${disk} is full`, { cause, retry: true, hint: 'Give the storage below the mirror more space; replication goes on by itself then.', context: { disk, condition: 'full' } })
  }
  return new CdpError('IO', `the storage of the mirror of disk ${disk} failed: ${error.message}`, { cause, retry: true, hint: 'Look at the storage below the mirror; it is opened again by itself.', context: { disk } })
}
