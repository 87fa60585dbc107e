import { readFile, stat } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError, errorCode } from '../../core/errors/index.ts'

export type ProxmoxPaths = {
  /** /var/run/qemu-server: ID.qmp, ID.pid. */
  qemuServerDirectory: string
  /** /etc/pve: qemu-server/ID.conf, .vmlist. */
  pveDirectory: string
}

/** A VM that runs on this node. `instance` changes when another QEMU process took its place. */
export type RunningVm = { vmId: number; qmpPath: string; instance: string }

/** Field 22 of /proc/PID/stat (proc(5)): together with the pid it names a process for ever. The name in field 2 may hold spaces. */
const startTicksOf = (processStat: string): string => processStat.slice(processStat.lastIndexOf(')') + 2).split(' ')[19]

/** The running QEMU of a VM, or undefined. Cheap: a read and two stats. */
export const findRunningVm = async (paths: ProxmoxPaths, vmId: number): Promise<RunningVm | undefined> => {
  const qmpPath = join(paths.qemuServerDirectory, `${vmId}.qmp`)
  try {
    const pid = Number((await readFile(join(paths.qemuServerDirectory, `${vmId}.pid`), 'utf8')).trim())
    if (!Number.isInteger(pid) || pid <= 0) return undefined
    const [processStat] = await Promise.all([readFile(`/proc/${pid}/stat`, 'utf8'), stat(qmpPath)])
    return { vmId, qmpPath, instance: `${pid}@${startTicksOf(processStat)}` }
  } catch (error) {
    if (errorCode(error) === 'ENOENT' || errorCode(error) === 'ESRCH') return undefined
    throw error
  }
}

/** The arguments that a QEMU was started with; undefined if they cannot be read. */
export const readCommandLine = async ({ instance }: RunningVm): Promise<string[] | undefined> => {
  const text = await readFile(`/proc/${instance.split('@')[0]}/cmdline`, 'utf8').catch(() => '')
  return text === '' ? undefined : text.split('\0')
}

/** True if the cluster knows that VM (its configuration is on this node). */
export const vmExists = async (paths: ProxmoxPaths, vmId: number): Promise<boolean> => {
  try {
    await stat(join(paths.pveDirectory, 'qemu-server', `${vmId}.conf`))
    return true
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return false
    throw new CdpError('IO', `the configuration of VM ${vmId} cannot be looked up`, { cause: error })
  }
}

/** Where a VM is by its configuration: on this node; on this node, and being migrated away from it, or just migrated to it (Proxmox's lock); not here. */
export type Whereabouts = 'here' | 'leaving' | 'elsewhere'

/** Cheap: one read. */
export const whereaboutsOf = async (paths: ProxmoxPaths, vmId: number): Promise<Whereabouts> => {
  try {
    const config = await readFile(join(paths.pveDirectory, 'qemu-server', `${vmId}.conf`), 'utf8')
    // Sections of snapshots follow; they have locks of their own time.
    const [current] = config.split(/^\[/m, 1)
    return /^lock: *migrate *$/m.test(current) ? 'leaving' : 'here'
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return 'elsewhere'
    throw error
  }
}

/** Longer ones do not fit into a mark of the journal; protection goes on without them. */
const MAX_CONFIG_BYTES = 100_000

/** The VM's configuration, versioned with the journal; undefined if there is none or it is beyond all reason. */
export const readVmConfig = async (paths: ProxmoxPaths, vmId: number): Promise<string | undefined> => {
  try {
    const config = await readFile(join(paths.pveDirectory, 'qemu-server', `${vmId}.conf`), 'utf8')
    return config.length > MAX_CONFIG_BYTES ? undefined : config
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return undefined
    throw error
  }
}
