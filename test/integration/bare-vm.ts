import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, mkdtemp, open, rename, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { withQmp } from '../../core/qmp/index.ts'
import type { QmpClient } from '../../core/qmp/index.ts'
import { proxmoxCommandLine } from '../lab/index.ts'
import type { VmShape } from '../lab/index.ts'

// A QEMU without an operating system, started with the command line that Proxmox VE uses, in both shapes. Load comes in through
// a writable NBD export of a drive's root node (`openWriteDoor`): writes pass whatever sits on that root, our mirror included.

export type { VmShape } from '../lab/index.ts'
export type BareDisk = { key: string; path: string; sizeBytes: number }
export type BareVm = {
  shape: VmShape
  dir: string
  qmpPath: string
  disks: readonly BareDisk[]
  pid: number
  /** What QEMU wrote to stderr. */
  stderr: () => string
  /** Opens, runs, closes. */
  qmp: <T>(work: (qmp: QmpClient) => Promise<T>) => Promise<T>
  /** SIGKILL. */
  kill: () => Promise<void>
  /** Ends as Proxmox ends it; the disks stay until disposal. */
  quit: () => Promise<void>
  [Symbol.asyncDispose]: () => Promise<void>
}

export type BareVmOptions = {
  shape: VmShape
  diskCount?: number
  bus?: 'scsi' | 'virtio'
  sizeBytes?: number
  format?: 'raw' | 'qcow2'
  /** Proxmox's discard=on. */
  discard?: boolean
  /** 8.4: the first write of the first disk that touches this sector fails. */
  failsOnceAtSector?: number
  /** Written to the start of the first disk, which is booted (see boot-sector.ts). */
  bootSector?: Buffer
  extraArgs?: readonly string[]
  /** Those of a bare VM that has ended and is not disposed of, as they are, instead of new ones. */
  disks?: readonly BareDisk[]
  /** The disks of that VM, which are there already: for the target of a live migration. Only the options above that are no options of disks count. */
  disksOf?: BareVm
}

/** The iothread that Proxmox gives the disk. */
export const ioThreadOf = (key: string): string => (key.startsWith('scsi') ? `iothread-virtioscsi${key.slice(4)}` : `iothread-${key}`)

const vmId = 100

const layOut = async (dir: string): Promise<{ qmpPath: string }> => {
  await mkdir(join(dir, 'var/run/qemu-server'), { recursive: true })
  return { qmpPath: join(dir, `var/run/qemu-server/${vmId}.qmp`) }
}

/** Starts QEMU and waits until it serves QMP. Everything it made is gone after disposal. */
export const startBareVm = async (options: BareVmOptions): Promise<BareVm> => {
  const { shape, diskCount = 1, bus = 'scsi', sizeBytes = 64 * 1024 * 1024, format = 'raw' } = options
  const dir = await mkdtemp('/tmp/cdp-')
  const { qmpPath } = await layOut(dir)
  const given = options.disks ?? options.disksOf?.disks
  const disks = given ?? Array.from({ length: diskCount }, (_, number) => ({ key: `${bus}${number}`, path: join(dir, `disk${number}.raw`), sizeBytes }))
  for (const disk of given === undefined ? disks : []) {
    {
      await using file = await open(disk.path, 'w')
      await file.truncate(sizeBytes)
      if (options.bootSector && disk === disks[0]) await file.write(options.bootSector, 0, 512, 0)
    }
    if (format === 'raw') continue
    await promisify(execFile)('qemu-img', ['convert', '-f', 'raw', '-O', format, disk.path, `${disk.path}.new`])
    await rename(`${disk.path}.new`, disk.path)
  }
  const fails = join(dir, 'fails.conf')
  if (options.failsOnceAtSector !== undefined) await writeFile(fails, `[inject-error]\nevent = "write_aio"\nerrno = "5"\nsector = "${options.failsOnceAtSector}"\nonce = "on"\n`)
  const vmDisks = disks.map(({ key, path }, number) => ({ key, path: number === 0 && options.failsOnceAtSector !== undefined ? `blkdebug:${fails}:${path}` : path, format, shareRw: true, ...(options.discard === true ? { discard: true } : {}) }))
  const args = proxmoxCommandLine({
    rootDir: dir, vmId, shape, name: 'bare', uuid: '00000000-0000-4000-8000-000000000000', disks: vmDisks, memoryMiB: 64, agent: false,
    args: ['-accel', 'tcg', '-drive', 'if=none,id=drive-ide2,media=cdrom', '-device', 'ide-cd,bus=ide.1,unit=0,drive=drive-ide2,id=ide2', ...(options.extraArgs ?? [])],
  })
  const child = spawn('qemu-system-x86_64', args, { stdio: ['ignore', 'ignore', 'pipe'] })
  let stderr = ''
  child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text))
  const exited = once(child, 'exit')
  const kill = async () => {
    child.kill('SIGKILL')
    await exited
  }
  // A QEMU that ended by a signal that nobody sent has crashed, whatever the test was about.
  const requireKilled = (): void => {
    if (child.signalCode !== null && child.signalCode !== 'SIGKILL' && child.signalCode !== 'SIGTERM') throw new Error(`QEMU has crashed (${child.signalCode}): ${stderr}`)
  }
  const vm: BareVm = {
    shape, dir, qmpPath, disks, pid: child.pid ?? -1, stderr: () => stderr, kill,
    qmp: (work) => withQmp(qmpPath, { deadlineMs: 10_000 }, work),
    quit: async () => {
      await vm.qmp((qmp) => qmp.execute('quit'))
      await exited
    },
    [Symbol.asyncDispose]: async () => {
      await kill()
      await rm(dir, { recursive: true, force: true })
      requireKilled()
    },
  }
  try {
    await listening(qmpPath, () => child.exitCode !== null)
    return vm
  } catch (error) {
    await vm[Symbol.asyncDispose]()
    throw new Error(`QEMU did not start: ${stderr}`, { cause: error })
  }
}

const listening = async (qmpPath: string, hasExited: () => boolean): Promise<void> => {
  const endsAtMs = performance.now() + 10_000
  while (true) {
    try {
      return await withQmp(qmpPath, { deadlineMs: 5000 }, async () => undefined)
    } catch (error) {
      if (hasExited() || performance.now() > endsAtMs) throw error
      await new Promise((resolve) => setTimeout(resolve, 20))
    }
  }
}
