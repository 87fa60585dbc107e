import { spawn } from 'node:child_process'
import type { ChildProcess } from 'node:child_process'
import { mkdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { CdpError, errorCode, errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { NbdClient } from '../../core/nbd/index.ts'
import { QmpClient } from '../../core/qmp/index.ts'
import type { MirrorRecord } from './mirror-record.ts'
import { NBD_SOCKET, QMP_SOCKET, withSocketPath } from './socket-path.ts'

export type StorageDaemonOptions = {
  /** `mirror/` of the VM: its sockets stand there. */
  directory: string
  log: Logger
  /** Asked before a storage is opened. @throws CdpError if it must not be */
  prepare: (disk: number, record: MirrorRecord) => Promise<void>
  /** For a start, and for each of its commands. Default 20 s. */
  deadlineMs?: number
}

type Running = { child: ChildProcess; qmp: QmpClient; served: Set<number>; exited: Promise<void>; heartbeat: NodeJS.Timeout; doomed: string | undefined }

const FIRST_RESTART_MS = 1000
const LAST_RESTART_MS = 30_000
const HEARTBEAT_MS = 10_000
const SECTOR_BYTES = 512

/**
 * The qemu-storage-daemon of one VM: serves the storages of its mirrors over NBD, the export of a disk under its number. Started with the first
 * storage, started again whenever it ends, ended with its process (pdeathsig).
 */
export class StorageDaemon implements AsyncDisposable {
  readonly #options: StorageDaemonOptions
  readonly #deadlineMs: number
  readonly #wanted = new Map<number, MirrorRecord>()
  #running: Running | undefined
  #queue: Promise<unknown> = Promise.resolve()
  #restart: NodeJS.Timeout | undefined
  #restartMs = FIRST_RESTART_MS
  #closed = false

  constructor(options: StorageDaemonOptions) {
    this.#options = options
    this.#deadlineMs = options.deadlineMs ?? 20_000
  }

  get pid(): number | undefined {
    return this.#running?.child.pid
  }

  /** From now on the storage is served, and again whenever the daemon was gone. @throws CdpError IO (cannot be opened, or the daemon not started), and what `prepare` throws; it is tried again later then */
  serve(disk: number, record: MirrorRecord): Promise<void> {
    this.#wanted.set(disk, record)
    return this.#alone(async () => this.#add(await this.#up(), disk, record))
  }

  /** Serves a storage with another size. Whoever is connected to it is cut off. @throws CdpError IO */
  resize(disk: number, record: MirrorRecord): Promise<void> {
    return this.#alone(async () => {
      const running = await this.#up()
      await this.#withdraw(running, disk)
      this.#wanted.set(disk, record)
      if (record.kind === 'device') return this.#add(running, disk, record)
      await this.#open(running, disk, record)
      try {
        await this.#command(running, 'block_resize', { 'node-name': nodeOf(disk), size: record.sizeBytes })
      } finally {
        await this.#export(running, disk)
      }
    })
  }

  /** Ends a daemon that is not to be trusted any more; another one takes its place. */
  kill(why: string): void {
    const running = this.#running
    if (running === undefined || running.doomed !== undefined) return
    running.doomed = why
    this.#options.log.error('the storage daemon of a VM is ended', { directory: this.#options.directory, why })
    running.child.kill('SIGKILL')
    void running.qmp.close()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    clearTimeout(this.#restart)
    await this.#queue
    const running = this.#running
    if (running === undefined) return
    await running.qmp.execute('quit', {}, { deadlineMs: 2000 }).catch(() => undefined)
    if (!(await within(running.exited, 2000))) running.child.kill('SIGKILL')
    // One that hangs in the kernel ends when the kernel lets it.
    await within(running.exited, 2000)
    await running.qmp.close()
  }

  /** One thing at a time. */
  #alone<T>(work: () => Promise<T>): Promise<T> {
    const done = this.#queue.then(() => {
      if (this.#closed) throw new CdpError('CLOSED', 'the mirrors of this VM are closed')
      return work()
    })
    this.#queue = done.catch(() => undefined)
    return done
  }

  async #up(): Promise<Running> {
    const old = this.#running
    if (old !== undefined && old.doomed === undefined) return old
    if (old !== undefined && !(await within(old.exited, this.#deadlineMs))) {
      throw new CdpError('IO', 'the storage below the mirrors of this VM hangs', { retry: true, hint: 'Look at the storage; its daemon cannot even be ended.', context: { why: old.doomed } })
    }
    const running = await this.#start()
    if (this.#wanted.size > 0) for (const [disk, record] of this.#wanted) await this.#add(running, disk, record).catch((error: unknown) => this.#complain(disk, error))
    return running
  }

  async #start(): Promise<Running> {
    const { directory, log } = this.#options
    await mkdir(directory, { recursive: true })
    for (const name of [NBD_SOCKET, QMP_SOCKET]) await rm(join(directory, name), { force: true })
    // The sockets are named relative to the directory: its path may be too long for one.
    const child = spawn('setpriv', ['--pdeathsig', 'KILL', '--', 'qemu-storage-daemon',
      '--chardev', `socket,id=qmp,path=${QMP_SOCKET},server=on,wait=off`, '--monitor', 'chardev=qmp', '--nbd-server', `addr.type=unix,addr.path=${NBD_SOCKET},max-connections=0`],
    { cwd: directory, stdio: ['ignore', 'ignore', 'pipe'] })
    let said = ''
    child.stderr.on('data', (chunk: Buffer) => {
      said = (said + chunk.toString()).slice(-2000)
    })
    let isOver = false
    const exited = new Promise<void>((resolve) => {
      child.once('error', (error) => {
        said = errorMessage(error)
        isOver = true
        resolve()
      })
      child.once('exit', () => {
        isOver = true
        resolve()
      })
    })
    const qmp = await this.#connect(directory, () => isOver).catch((error: unknown) => {
      child.kill('SIGKILL')
      throw new CdpError('IO', `the storage daemon of the mirrors does not start: ${said.trim() || errorMessage(error)}`, { cause: error, retry: true, hint: 'qemu-storage-daemon (package qemu-utils) and setpriv are needed.' })
    })
    const heartbeat = setInterval(() => {
      qmp.execute('query-block-exports', {}, { deadlineMs: this.#deadlineMs }).catch(() => running.qmp === this.#running?.qmp && this.kill('its monitor does not answer'))
    }, HEARTBEAT_MS).unref()
    const running: Running = { child, qmp, served: new Set(), exited, heartbeat, doomed: undefined }
    this.#running = running
    void exited.then(() => {
      clearInterval(heartbeat)
      void qmp.close()
      if (this.#running === running) this.#running = undefined
      if (this.#closed) return
      log.error('the storage daemon of a VM ended', { directory, why: running.doomed ?? said.trim(), againInMs: this.#restartMs })
      this.#later()
    })
    return running
  }

  async #connect(directory: string, isOver: () => boolean): Promise<QmpClient> {
    const untilMs = performance.now() + this.#deadlineMs
    for (;;) {
      try {
        return await withSocketPath(directory, QMP_SOCKET, (path) => QmpClient.connect(path, { deadlineMs: this.#deadlineMs, commandDeadlineMs: this.#deadlineMs }))
      } catch (error) {
        if (errorCode(error) !== 'NOT_FOUND' || isOver() || performance.now() > untilMs) throw error
        await delay(20)
      }
    }
  }

  #later(): void {
    clearTimeout(this.#restart)
    if (this.#closed || this.#wanted.size === 0) return
    this.#restart = setTimeout(() => void this.#alone(async () => {
      const running = await this.#up()
      for (const [disk, record] of this.#wanted) await this.#add(running, disk, record)
      this.#restartMs = FIRST_RESTART_MS
    }).catch((error: unknown) => {
      if (this.#closed) return
      this.#options.log.warn('not every mirror of a VM can be served', { directory: this.#options.directory, error: errorMessage(error) })
      this.#later()
    }), this.#restartMs).unref()
    this.#restartMs = Math.min(LAST_RESTART_MS, this.#restartMs * 2)
  }

  #complain(disk: number, error: unknown): void {
    this.#options.log.error('a mirror cannot be served', { directory: this.#options.directory, disk, error: errorMessage(error), ...(error instanceof CdpError ? { hint: error.hint } : {}) })
  }

  async #add(running: Running, disk: number, record: MirrorRecord): Promise<void> {
    if (running.served.has(disk)) return
    try {
      await this.#options.prepare(disk, record)
      const direct = await this.#open(running, disk, record)
      await this.#export(running, disk)
      if (!direct || (await this.#minBytes(disk)) <= SECTOR_BYTES) return
      // Direct access to this storage is in larger units than a sector.
      await this.#withdraw(running, disk)
      await this.#command(running, 'blockdev-add', nodeFor(disk, record, false))
      await this.#export(running, disk)
    } catch (error) {
      if (!running.served.has(disk)) await running.qmp.execute('blockdev-del', { 'node-name': nodeOf(disk) }).catch(() => undefined)
      this.#later()
      throw error
    }
  }

  /** @returns whether past the page cache */
  async #open(running: Running, disk: number, record: MirrorRecord): Promise<boolean> {
    try {
      await this.#command(running, 'blockdev-add', nodeFor(disk, record, true))
      return true
    } catch (error) {
      if (errorCode(error) !== 'QMP_COMMAND') throw error
    }
    try {
      await this.#command(running, 'blockdev-add', nodeFor(disk, record, false))
      return false
    } catch (cause) {
      throw new CdpError('IO', `the mirror of disk ${disk} cannot be opened: ${errorMessage(cause)}`, { cause, retry: true, hint: `Look at ${record.path}; nothing else may have it open.`, context: { disk, path: record.path } })
    }
  }

  async #export(running: Running, disk: number): Promise<void> {
    await this.#command(running, 'block-export-add', { type: 'nbd', id: exportOf(disk), 'node-name': nodeOf(disk), name: String(disk), writable: true })
    running.served.add(disk)
  }

  async #withdraw(running: Running, disk: number): Promise<void> {
    if (!running.served.delete(disk)) return
    const { eventMark } = running.qmp
    await this.#command(running, 'block-export-del', { id: exportOf(disk), mode: 'hard' })
    await running.qmp.waitForEvent(({ event, data }) => event === 'BLOCK_EXPORT_DELETED' && (data as { id?: unknown }).id === exportOf(disk), { deadlineMs: this.#deadlineMs, sinceMark: eventMark })
    await this.#command(running, 'blockdev-del', { 'node-name': nodeOf(disk) })
  }

  async #minBytes(disk: number): Promise<number> {
    await using client = await withSocketPath(this.#options.directory, NBD_SOCKET, (path) => NbdClient.connect({ path }, { exportName: String(disk), deadlineMs: this.#deadlineMs }))
    return client.blockSize.minBytes
  }

  /** A command that is not answered ends the daemon: nobody knows what it does. */
  async #command(running: Running, command: string, args: Record<string, unknown>): Promise<void> {
    try {
      await running.qmp.execute(command, args)
    } catch (error) {
      if (errorCode(error) === 'TIMEOUT') this.kill(`${command} was not answered`)
      throw error
    }
  }
}

const nodeOf = (disk: number): string => `mirror-${disk}`
const exportOf = (disk: number): string => `export-${disk}`

const nodeFor = (disk: number, { kind, path, sizeBytes }: MirrorRecord, direct: boolean): Record<string, unknown> => {
  const below = { filename: path, cache: { direct }, discard: 'unmap' }
  return kind === 'qcow2'
    ? { driver: 'qcow2', 'node-name': nodeOf(disk), discard: 'unmap', cache: { direct }, file: { driver: 'file', ...below } }
    : { driver: 'raw', 'node-name': nodeOf(disk), discard: 'unmap', cache: { direct }, size: sizeBytes, file: { driver: 'host_device', ...below } }
}

const within = async (work: Promise<void>, waitMs: number): Promise<boolean> => {
  const late = new AbortController()
  const done = await Promise.race([work.then(() => true), delay(waitMs, false, { signal: late.signal }).catch(() => false)])
  late.abort()
  return done
}
