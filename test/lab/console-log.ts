import { closeSync, openSync, readSync, watch, type FSWatcher } from 'node:fs'
import { CdpError } from '../../core/errors/index.ts'

/** The lines of a file that somebody else appends to (a guest's console), as they come. */
export class ConsoleLog {
  readonly lines: string[] = []
  readonly #path: string
  readonly #file: number
  readonly #watcher: FSWatcher
  readonly #waiters = new Set<() => void>()
  readonly #buffer = Buffer.alloc(65_536)
  #rest = ''
  #closed = false

  /** The file has to be there. With `fromBytes` what stands before it is not read. */
  constructor(path: string, fromBytes = 0) {
    this.#path = path
    this.#file = openSync(path, 'r')
    this.#positionBytes = fromBytes
    this.#watcher = watch(path, { persistent: false }, () => this.#read())
    this.#read()
  }

  #positionBytes: number

  /** The first line, from the beginning, that matches; TIMEOUT with the last lines otherwise, CLOSED if the log is closed meanwhile, ABORTED. */
  async waitForLine(pattern: RegExp, deadlineMs: number, signal?: AbortSignal): Promise<string> {
    let next = 0
    return new Promise((resolve, reject) => {
      const done = (end: () => void): void => {
        clearTimeout(timer)
        this.#waiters.delete(look)
        signal?.removeEventListener('abort', abort)
        end()
      }
      const fail = (code: 'TIMEOUT' | 'CLOSED' | 'ABORTED', why: string): void =>
        done(() => reject(new CdpError(code, `${this.#path}: ${why} waiting for ${String(pattern)}; last lines:\n${this.lines.slice(-15).join('\n')}`)))
      const look = (): void => {
        for (; next < this.lines.length; next++) {
          const line = this.lines[next]
          if (pattern.test(line)) return done(() => resolve(line))
        }
        if (this.#closed) fail('CLOSED', 'it ended')
      }
      const abort = (): void => fail('ABORTED', 'the caller gave up')
      const timer = setTimeout(() => fail('TIMEOUT', `${deadlineMs} ms passed`), deadlineMs)
      this.#waiters.add(look)
      signal?.addEventListener('abort', abort)
      if (signal?.aborted) return abort()
      look()
    })
  }

  close(): void {
    if (this.#closed) return
    this.#read()
    this.#closed = true
    this.#watcher.close()
    closeSync(this.#file)
    for (const look of [...this.#waiters]) look()
  }

  #read(): void {
    if (this.#closed) return
    for (;;) {
      const lengthBytes = readSync(this.#file, this.#buffer, 0, this.#buffer.length, this.#positionBytes)
      if (lengthBytes === 0) break
      this.#positionBytes += lengthBytes
      const pieces = (this.#rest + this.#buffer.toString('latin1', 0, lengthBytes)).split('\n')
      this.#rest = pieces.pop()!
      for (const piece of pieces) this.lines.push(piece.replaceAll('\r', ''))
    }
    for (const look of [...this.#waiters]) look()
  }
}
