import { spawn } from 'node:child_process'
import { closeSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { iothreadOf, proxmoxCommandLine, type CommandLine, type VmDisk, type VmShape } from './command-line.ts'
import { ConsoleLog } from './console-log.ts'
import { Monitor } from './monitor.ts'
import { defaultNodeName, makeNode, pathsOf, registerVm, removeRunFiles, uuidOf } from './node-files.ts'
import { commandLineOf, endProcess, isAlive, tool, waitForEnd, withDeadline } from './process.ts'

export type StartVmOptions = {
  /** Stands for /. At most about 75 bytes: unix socket paths end at 107. */
  rootDir: string
  vmId: number
  shape: VmShape
  disks: readonly VmDisk[]
  nodeName?: string
  name?: string
  memoryMiB?: number
  kernel?: string
  initrd?: string
  append?: string
  /** A virtio-serial port org.qemu.guest_agent.0 at ID.qga. */
  agent?: boolean
  /** Starts QEMU's own NBD server there, with a writable export of each disk's root node, named after its key: the load of a VM without an OS. Such disks need shareRw. */
  nbdServerPath?: string
  /** The VM goes on when this process ends (lab up). By default it is killed with it. */
  outliveParent?: boolean
  /** Called as soon as QEMU answers, before any guest has booted. */
  onStarted?: (vm: LabVm) => void
  /** Starts with stopped CPUs, as Proxmox's freeze: 1 does. */
  frozen?: boolean
}

/**
 * Starts a VM with the command line and the files of a Proxmox node. Returns when QEMU answers.
 * Its own monitor is ROOT/lab/ID.mon; ID.qmp is left to the programs under test.
 */
export const startVm = async (options: StartVmOptions): Promise<LabVm> => {
  const { rootDir, vmId, shape, nodeName = defaultNodeName } = options
  const paths = pathsOf(rootDir, vmId)
  if (Buffer.byteLength(paths.serial0) > 107) throw new CdpError('BAD_INPUT', `${paths.serial0} is too long for a unix socket`, { hint: 'use a shorter root directory' })
  const running = runningPid(rootDir, vmId)
  if (running !== undefined) throw new CdpError('CONFLICT', `VM ${vmId} runs already, process ${running}`)
  makeNode(rootDir, nodeName)
  removeRunFiles(rootDir, vmId)
  const disks = await Promise.all(options.disks.map(async (disk) => ({ ...disk, sizeBytes: disk.sizeBytes ?? (await virtualSizeBytes(disk.path, disk.format)) })))
  const kernelArgs = [...(options.kernel ? ['-kernel', options.kernel] : []), ...(options.initrd ? ['-initrd', options.initrd] : []), ...(options.append ? ['-append', options.append] : [])]
  const labArgs = ['-accel', 'tcg', '-chardev', `file,id=console,path=${paths.console},append=on`, '-serial', 'chardev:console', '-chardev', `socket,id=lab,path=${paths.monitor},server=on,wait=off`, '-mon', 'chardev=lab,mode=control']
  const line: CommandLine = {
    rootDir, vmId, shape, disks,
    name: options.name ?? `lab${vmId}`,
    uuid: uuidOf(vmId),
    memoryMiB: options.memoryMiB ?? 256,
    agent: options.agent ?? false,
    args: [...labArgs, ...(options.frozen ? ['-S'] : []), ...kernelArgs],
  }
  registerVm({ ...line, args: [...labArgs, ...kernelArgs] }, nodeName)
  writeFileSync(paths.console, '')
  const stderr = openSync(paths.stderr, 'w')
  const qemu = ['qemu-system-x86_64', ...proxmoxCommandLine(line)]
  const [command, ...args] = options.outliveParent ? qemu : ['setpriv', '--pdeathsig', 'KILL', '--', ...qemu]
  const child = spawn(command, args, { stdio: ['ignore', stderr, stderr], detached: options.outliveParent ?? false })
  closeSync(stderr)
  const ended = new Promise<void>((resolve) => child.on('exit', () => resolve()).on('error', () => resolve()))
  const diagnosis = (): string => readFileSync(paths.stderr, 'utf8').trim()
  const console = new ConsoleLog(paths.console)
  try {
    const monitor = await openMonitor(paths.monitor, ended, diagnosis)
    if (options.outliveParent) child.unref()
    const vm = new LabVm({ rootDir, vmId, pid: child.pid!, console, monitor, ended })
    if (options.nbdServerPath) await serveDisks(monitor, options.nbdServerPath, options.disks, shape)
    options.onStarted?.(vm)
    return vm
  } catch (cause) {
    child.kill('SIGKILL')
    console.close()
    await ended
    removeRunFiles(rootDir, vmId)
    throw cause
  }
}

/** Takes over a VM that another process started under this root directory (lab up). */
export const attachVm = async (rootDir: string, vmId: number): Promise<LabVm> => {
  const pid = runningPid(rootDir, vmId)
  if (pid === undefined) throw new CdpError('NOT_FOUND', `VM ${vmId} does not run under ${rootDir}`)
  const paths = pathsOf(rootDir, vmId)
  const monitor = await Monitor.open(paths.monitor)
  return new LabVm({ rootDir, vmId, pid, console: new ConsoleLog(paths.console), monitor, ended: undefined })
}

/** The process of a VM if one runs: of ID.pid, and only if its command line names this root. */
export const runningPid = (rootDir: string, vmId: number): number | undefined => {
  let pid: number
  try {
    pid = Number(readFileSync(pathsOf(rootDir, vmId).pid, 'utf8'))
  } catch {
    return undefined // no such file: it does not run
  }
  return commandLineOf(pid)?.some((arg) => arg.includes(`path=${pathsOf(rootDir, vmId).qmp},`)) ? pid : undefined
}

type Parts = { rootDir: string; vmId: number; pid: number; console: ConsoleLog; monitor: Monitor; ended: Promise<void> | undefined }

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

  constructor(parts: Parts) {
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

  waitForLine(pattern: RegExp, deadlineMs: number): Promise<string> {
    return this.console.waitForLine(pattern, deadlineMs)
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

const virtualSizeBytes = async (path: string, format: string): Promise<number> => {
  const { stdout } = await tool('qemu-img', ['info', '--output=json', '-U', '-f', format, path])
  return (JSON.parse(stdout) as { 'virtual-size': number })['virtual-size']
}

const openMonitor = async (path: string, ended: Promise<void>, diagnosis: () => string): Promise<Monitor> => {
  const until = performance.now() + 15_000
  let over = false
  void ended.then(() => (over = true))
  for (;;) {
    try {
      return await Monitor.open(path, 10_000)
    } catch (error) {
      if (over) throw new CdpError('CLOSED', `QEMU did not start: ${diagnosis()}`)
      if (performance.now() > until) throw new CdpError('TIMEOUT', `QEMU opens no monitor: ${errorMessage(error)} ${diagnosis()}`)
      await new Promise((resolve) => setTimeout(resolve, 20)) // the socket appears some time after exec
    }
  }
}

/** Exports the root nodes over QEMU's NBD server, writable, in the disks' own iothreads, named after their keys. A mirror attached later carries these exports along. */
const serveDisks = async (monitor: Monitor, path: string, disks: readonly VmDisk[], shape: VmShape): Promise<void> => {
  rmSync(path, { force: true })
  await monitor.run('nbd-server-start', { addr: { type: 'unix', data: { path } }, 'max-connections': 0 })
  const blocks = (await monitor.run('query-block')) as { device: string; inserted?: { 'node-name': string } }[]
  for (const { key } of disks) {
    const node = shape === '9.x' ? `drive-${key}` : blocks.find(({ device }) => device === `drive-${key}`)?.inserted?.['node-name']
    if (!node) throw new CdpError('NOT_FOUND', `no node of ${key}`)
    const args = { type: 'nbd', id: `load-${key}`, 'node-name': node, name: key, writable: true, iothread: iothreadOf(key), 'fixed-iothread': true }
    const until = performance.now() + 10_000
    for (;;) {
      try {
        await monitor.run('block-export-add', args)
        break
      } catch (error) {
        // the firmware has to start a virtio-blk device before its iothread may be shared
        if (!errorMessage(error).includes('Cannot change iothread') || performance.now() > until) throw error
        await new Promise((resolve) => setTimeout(resolve, 20))
      }
    }
  }
}
