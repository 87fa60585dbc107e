import type { ConsoleLog } from './console-log.ts'
import type { Monitor } from './monitor.ts'
import { pathsOf, removeRunFiles } from './node-files.ts'
import { endProcess, isAlive, waitForEnd, withDeadline } from './process.ts'

export type LabVmParts = { rootDir: string; vmId: number; pid: number; console: ConsoleLog; monitor: Monitor; ended: Promise<void> | undefined }

/** A running VM of the lab: its files, its console, and the ways it can end. */
export class LabVm {
  readonly pid: number
  readonly rootDir: string
  readonly vmId: number
  /** Proxmox's monitor socket; one client at a time. */
  readonly qmpPath: string
  readonly serial0Path: string
  /** The guest's console. */
  readonly console: ConsoleLog
  /** A monitor of the lab's own. */
  readonly monitor: Monitor
  readonly #ended: Promise<void> | undefined
  #stopping: Promise<void> | undefined
  #over = false

  constructor(parts: LabVmParts) {
    this.pid = parts.pid
    this.rootDir = parts.rootDir
    this.vmId = parts.vmId
    const paths = pathsOf(parts.rootDir, parts.vmId)
    this.qmpPath = paths.qmp
    this.serial0Path = paths.serial0
    this.console = parts.console
    this.monitor = parts.monitor
    this.#ended = parts.ended
  }

  waitForLine(pattern: RegExp, deadlineMs: number, signal?: AbortSignal): Promise<string> {
    return this.console.waitForLine(pattern, deadlineMs, signal)
  }

  /** False once QEMU has ended, for whatever reason. */
  get running(): boolean {
    return isAlive(this.pid)
  }

  /** qm shutdown: power button, `quit` once the guest is down, SIGKILL at the deadline. True if the guest went down by itself. */
  async stop(deadlineMs = 15_000): Promise<boolean> {
    if (this.#over) return true
    const down = this.waitForGuestDown(deadlineMs)
    let graceful = true
    try {
      await this.monitor.run('system_powerdown', {}, deadlineMs)
      await down
    } catch {
      graceful = false // no OS, or one that does not listen: the deadline decides
      await down.catch(() => undefined)
    }
    await this.quit()
    return graceful
  }

  /** Resolves when the guest has powered itself off (QEMU stays, as on Proxmox, until it is told to quit). */
  async waitForGuestDown(deadlineMs: number): Promise<void> {
    let stop: (() => void) | undefined
    const down = new Promise<void>((resolve) => {
      stop = this.monitor.onEvent((event) => {
        if (event.name === 'SHUTDOWN') resolve()
      })
    })
    try {
      const status = (await this.monitor.run('query-status')) as { status: string }
      if (status.status !== 'shutdown') await withDeadline(down, deadlineMs, `shutdown of guest ${this.vmId}`)
    } finally {
      stop?.()
    }
  }

  /** qm stop: ends QEMU at once by its monitor: clean for its block jobs, a power failure for the guest. */
  async quit(deadlineMs = 10_000): Promise<void> {
    if (this.#over) return
    await this.monitor.run('quit', {}, deadlineMs).catch(() => undefined) // QEMU may close before it answers
    if (!(await waitForEnd(this.pid, deadlineMs))) return this.kill()
    await this.#clean()
  }

  /** SIGKILL to QEMU: nothing is flushed. */
  async kill(): Promise<void> {
    if (this.#over) return
    try {
      process.kill(this.pid, 'SIGKILL')
    } catch {
      // it ended in between
    }
    if (!(await waitForEnd(this.pid, 10_000))) await endProcess(this.pid)
    await this.#clean()
  }

  /** Lets go of a VM that shall go on. */
  detach(): void {
    this.#over = true
    this.monitor.close()
    this.console.close()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stopping ??= this.quit(3_000)
    await this.#stopping
  }

  async #clean(): Promise<void> {
    if (this.#over) return
    this.#over = true
    await this.#ended
    this.monitor.close()
    this.console.close()
    removeRunFiles(this.rootDir, this.vmId)
  }
}
