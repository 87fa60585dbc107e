import { spawn } from 'node:child_process'
import type { ChildProcess } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import type { Logger } from '../../core/log/index.ts'

const BEAT_MS = 200
/** With the time that QEMU takes to drop its jobs, a guest has to go on within 2 s. */
const LIMIT_MS = 1_300

/** Starts the watchdog process and keeps it fed; a watchdog that dies is started again. */
export class Watchdog implements Disposable {
  readonly #log: Logger
  readonly #healthy: () => boolean
  #child: ChildProcess | undefined
  #timer: NodeJS.Timeout | undefined
  #respawn: NodeJS.Timeout | undefined
  #disposed = false

  /** @param healthy false: a worker hangs and could not be ended; no sign of life is given any more */
  constructor(options: { log: Logger; healthy: () => boolean }) {
    this.#log = options.log
    this.#healthy = options.healthy
  }

  start(): void {
    this.#spawn()
    this.#timer = setInterval(() => {
      if (this.#healthy() && this.#child?.stdin?.writableLength === 0) this.#child.stdin.write('.')
    }, BEAT_MS)
  }

  [Symbol.dispose](): void {
    this.#disposed = true
    clearInterval(this.#timer)
    clearTimeout(this.#respawn)
    this.#child?.stdin?.end()
    this.#child?.removeAllListeners('exit')
  }

  #spawn(): void {
    const file = fileURLToPath(new URL(import.meta.url.endsWith('.ts') ? './watchdog.ts' : './watchdog.js', import.meta.url))
    const child = spawn(process.execPath, ['--max-old-space-size=16', '--max-semi-space-size=1', file, String(process.pid), String(LIMIT_MS)], { stdio: ['pipe', 'ignore', 'inherit'], detached: true })
    this.#child = child
    child.stdin?.on('error', () => undefined)
    child.on('error', (error) => {
      this.#log.error('the watchdog cannot be started', { error: error.message })
      // Without a process there is no 'exit'.
      if (child.pid === undefined) this.#again()
    })
    child.on('exit', () => {
      if (this.#disposed) return
      this.#log.error('the watchdog has ended and is started again')
      this.#again()
    })
  }

  #again(): void {
    clearTimeout(this.#respawn)
    if (!this.#disposed) this.#respawn = setTimeout(() => this.#spawn(), 500)
  }
}
