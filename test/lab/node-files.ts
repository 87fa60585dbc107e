import { createHash } from 'node:crypto'
import { lstatSync, mkdirSync, readFileSync, readlinkSync, renameSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import { machineOf, type CommandLine, type VmDisk } from './command-line.ts'

/** The name of the node that a lab root stands for, unless another is given. */
export const defaultNodeName = 'lab'

export type NodePaths = { qmp: string; pid: string; serial0: string; qga: string; config: string; vmlist: string; monitor: string; console: string; stderr: string; intent: string }

/** Where the files of a VM are below a root directory. The last four are the lab's own; Proxmox has none of them. */
export const pathsOf = (rootDir: string, vmId: number): NodePaths => {
  const run = `${rootDir}/var/run/qemu-server/${vmId}`
  const lab = `${rootDir}/lab/${vmId}`
  return {
    qmp: `${run}.qmp`,
    pid: `${run}.pid`,
    serial0: `${run}.serial0`,
    qga: `${run}.qga`,
    config: `${rootDir}/etc/pve/qemu-server/${vmId}.conf`,
    vmlist: `${rootDir}/etc/pve/.vmlist`,
    monitor: `${lab}.mon`,
    console: `${lab}.console`,
    stderr: `${lab}.stderr`,
    intent: `${lab}.json`,
  }
}

/** Makes the directories of a node: /etc/pve/qemu-server leads through the symlinks that pmxcfs shows. */
export const makeNode = (rootDir: string, nodeName = defaultNodeName): void => {
  const pve = `${rootDir}/etc/pve`
  for (const dir of [`${rootDir}/var/run/qemu-server`, `${rootDir}/lab`, `${pve}/nodes/${nodeName}/qemu-server`]) mkdirSync(dir, { recursive: true })
  for (const [link, target] of [['local', `nodes/${nodeName}`], ['qemu-server', `nodes/${nodeName}/qemu-server`]] as const) {
    if (!lstatSync(`${pve}/${link}`, { throwIfNoEntry: false })) symlinkSync(target, `${pve}/${link}`)
  }
}

/** Writes ID.conf as Proxmox would have it, and lists the VM in .vmlist. */
export const registerVm = (vm: CommandLine, nodeName = defaultNodeName): void => {
  const values: Record<string, string> = {
    ...(vm.agent ? { agent: '1' } : {}),
    ...(vm.args.length > 0 ? { args: vm.args.map((arg) => (/[\s'"]/.test(arg) ? `'${arg}'` : arg)).join(' ') } : {}),
    balloon: '0',
    boot: `order=${vm.disks.map(({ key }) => key).join(';')}`,
    cores: '1',
    kvm: '0',
    machine: machineOf(vm.shape),
    memory: String(vm.memoryMiB),
    meta: `creation-qemu=${vm.shape === '8.4' ? '9.2.0' : '10.0.2'},ctime=1700000000`,
    name: vm.name,
    numa: '0',
    ostype: 'l26',
    ...Object.fromEntries(vm.disks.map((disk) => [disk.key, diskValue(disk)])),
    scsihw: 'virtio-scsi-single',
    serial0: 'socket',
    smbios1: `uuid=${vm.uuid}`,
    sockets: '1',
    tablet: '0',
    vga: 'serial0',
  }
  const lines = Object.keys(values).sort().map((key) => `${key}: ${values[key]}\n`)
  replaceFile(pathsOf(vm.rootDir, vm.vmId).config, lines.join(''))
  placeVm(vm.rootDir, vm.vmId, nodeName)
}

/** Lists a VM with a node. */
export const placeVm = (rootDir: string, vmId: number, nodeName: string): void => editVmlist(rootDir, (ids, version) => (ids[vmId] = { node: nodeName, type: 'qemu', version }))

/** What `qm destroy` does to the cluster's files. */
export const unregisterVm = (rootDir: string, vmId: number): void => {
  rmSync(pathsOf(rootDir, vmId).config, { force: true })
  editVmlist(rootDir, (ids) => delete ids[vmId])
}

/** What Proxmox removes when a VM's QEMU is gone; the configuration stays. */
export const removeRunFiles = (rootDir: string, vmId: number): void => {
  const paths = pathsOf(rootDir, vmId)
  for (const path of [paths.qmp, paths.pid, paths.serial0, paths.qga, paths.monitor]) rmSync(path, { force: true })
}

/** The same VM keeps its UUID over starts. */
export const uuidOf = (vmId: number): string =>
  createHash('sha256').update(`lab-vm-${vmId}`).digest('hex').slice(0, 32).replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, '$1-$2-$3-$4-$5')

const diskValue = ({ path, sizeBytes, discard }: VmDisk): string => `${path},${discard ? 'discard=on,' : ''}iothread=1,size=${sizeText(sizeBytes ?? statSync(path).size)}`

const sizeText = (sizeBytes: number): string => {
  let size = sizeBytes
  for (const unit of ['', 'K', 'M', 'G']) {
    if (size % 1024 !== 0 || size === 0) return `${size}${unit}`
    size /= 1024
  }
  return `${size}T`
}

type VmListEntry = { node: string; type: string; version: number }

/** Synchronous and by rename, so that VMs of one root which start together do not lose each other's entry, and a reader sees a whole file. */
const editVmlist = (rootDir: string, change: (ids: Record<string, VmListEntry>, version: number) => unknown): void => {
  const listed = `${rootDir}/etc/pve/.vmlist`
  // In a cluster of the lab it is a link to the one list that the nodes share.
  const path = lstatSync(listed, { throwIfNoEntry: false })?.isSymbolicLink() ? readlinkSync(listed) : listed
  const present = statSync(path, { throwIfNoEntry: false }) ? (JSON.parse(readFileSync(path, 'utf8')) as { version: number; ids: Record<string, VmListEntry> }) : { version: 0, ids: {} }
  const version = present.version + 1
  change(present.ids, version)
  const entries = Object.entries(present.ids).map(([id, { node, type, version: seen }]) => `"${id}": { "node": "${node}", "type": "${type}", "version": ${seen} }`)
  replaceFile(path, `{\n"version": ${version},\n"ids": {\n${entries.join(',\n')}}\n\n}\n`)
}

const replaceFile = (path: string, text: string): void => {
  mkdirSync(dirname(path), { recursive: true })
  writeFileSync(`${path}.tmp.${process.pid}`, text)
  renameSync(`${path}.tmp.${process.pid}`, path)
}
