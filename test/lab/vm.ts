import { spawn } from 'node:child_process'
import { closeSync, existsSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { iothreadOf, proxmoxCommandLine, type CommandLine, type VmDisk, type VmShape } from './command-line.ts'
import { ConsoleLog } from './console-log.ts'
import { LabVm } from './lab-vm.ts'
import { Monitor } from './monitor.ts'
import { defaultNodeName, makeNode, pathsOf, registerVm, removeRunFiles, uuidOf } from './node-files.ts'
import { commandLineOf, tool } from './process.ts'

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
  /** The target of a live migration: waits for the state of a VM there ('unix:PATH'), and is in no configuration yet. */
  incoming?: string
  /** Gives up the start; nothing is left then. */
  signal?: AbortSignal
}

/**
 * Starts a VM with the command line and the files of a Proxmox node. Returns when QEMU answers.
 * Its own monitor is ROOT/lab/ID.mon; ID.qmp is left to the programs under test.
 */
export const startVm = async (options: StartVmOptions): Promise<LabVm> => {
  const { rootDir, vmId, shape, nodeName = defaultNodeName } = options
  const paths = pathsOf(rootDir, vmId)
  if (Buffer.byteLength(paths.serial0) > 107) throw new CdpError('BAD_INPUT', `${paths.serial0} is too long for a unix socket`, { hint: 'use a shorter root directory' })
  if (options.signal?.aborted) throw new CdpError('ABORTED', `the start of VM ${vmId} was given up`)
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
    args: [...labArgs, ...(options.frozen ? ['-S'] : []), ...(options.incoming ? ['-incoming', options.incoming, '-S'] : []), ...kernelArgs],
  }
  if (options.incoming === undefined) registerVm({ ...line, args: [...labArgs, ...kernelArgs] }, nodeName)
  writeFileSync(paths.console, '')
  const stderr = openSync(paths.stderr, 'w')
  const qemu = ['qemu-system-x86_64', ...proxmoxCommandLine(line)]
  const [command, ...args] = options.outliveParent ? qemu : ['setpriv', '--pdeathsig', 'KILL', '--', ...qemu]
  const child = spawn(command, args, { stdio: ['ignore', stderr, stderr], detached: options.outliveParent ?? false })
  closeSync(stderr)
  const ended = new Promise<void>((resolve) => child.on('exit', () => resolve()).on('error', () => resolve()))
  const diagnosis = (): string => readFileSync(paths.stderr, 'utf8').trim()
  // A guest whose QEMU breaks is the worst that can be seen: never in silence, whatever the test asks.
  child.once('exit', (code, signal) => {
    if (code === 0 || signal === 'SIGKILL' || signal === 'SIGTERM') return
    process.stderr.write(`QEMU of VM ${vmId} ended by itself with ${signal ?? `code ${code}`}: ${existsSync(paths.stderr) ? diagnosis() : ''}\n`)
  })
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
