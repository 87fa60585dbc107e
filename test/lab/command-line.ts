import { createHash } from 'node:crypto'

/** Which generation of Proxmox's command line: 8.4 uses -drive, 9.x (machine 10.0 or newer) -blockdev with a throttle node on top. */
export type VmShape = '8.4' | '9.x'

export type VmDisk = {
  /** As in the VM's configuration: 'scsi0'..'scsi30' or 'virtio0'..'virtio5'. */
  key: string
  path: string
  format: 'raw' | 'qcow2'
  /** Proxmox's discard=on. */
  discard?: boolean
  /** Lets an export write beside the device (share-rw=on); Proxmox has no such option. */
  shareRw?: boolean
  /** Size as written into the configuration; read from the image if it is not given. */
  sizeBytes?: number
}

export type CommandLine = {
  /** The directory that stands for /. */
  rootDir: string
  vmId: number
  shape: VmShape
  name: string
  uuid: string
  disks: readonly VmDisk[]
  memoryMiB: number
  agent: boolean
  /** What Proxmox's `args` would add. */
  args: readonly string[]
}

/** The machine type a VM made on that release would have, without Proxmox's own suffix. */
export const machineOf = (shape: VmShape): string => (shape === '8.4' ? 'pc-i440fx-9.2' : 'pc-i440fx-10.0')

/**
 * The arguments of qemu-system-x86_64 in the order Proxmox VE gives them (seen in the expected outputs of qemu-server's own tests).
 * Left out, because Debian's QEMU has no -id and nobody looks: -id, -iscsi, USB, the boot menu (it waits 2.5 s), -daemonize.
 */
export const proxmoxCommandLine = (vm: CommandLine): string[] => {
  const run = `${vm.rootDir}/var/run/qemu-server/${vm.vmId}`
  const iothreads = vm.disks.flatMap(({ key }) => ['-object', `iothread,id=${iothreadOf(key)}`])
  const throttles = vm.shape === '9.x' ? vm.disks.flatMap(({ key }) => ['-object', JSON.stringify({ id: `throttle-drive-${key}`, limits: {}, 'qom-type': 'throttle-group' })]) : []
  return [
    '-name', `${vm.name},debug-threads=on`,
    '-no-shutdown',
    '-chardev', `socket,id=qmp,path=${run}.qmp,server=on,wait=off`,
    '-mon', 'chardev=qmp,mode=control',
    '-chardev', `socket,id=qmp-event,path=${vm.rootDir}/var/run/qmeventd.sock,reconnect-ms=5000`,
    '-mon', 'chardev=qmp-event,mode=control',
    '-pidfile', `${run}.pid`,
    '-smbios', `type=1,uuid=${vm.uuid}`,
    '-smp', '1,sockets=1,cores=1,maxcpus=1',
    '-nodefaults',
    '-boot', 'strict=on,reboot-timeout=1000',
    '-nographic',
    '-cpu', 'qemu64',
    '-m', String(vm.memoryMiB),
    ...iothreads,
    ...throttles,
    '-global', 'PIIX4_PM.disable_s3=1',
    '-global', 'PIIX4_PM.disable_s4=1',
    '-device', 'pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e',
    '-device', 'pci-bridge,id=pci.2,chassis_nr=2,bus=pci.0,addr=0x1f',
    '-device', 'pci-bridge,id=pci.3,chassis_nr=3,bus=pci.0,addr=0x5',
    '-chardev', `socket,id=serial0,path=${run}.serial0,server=on,wait=off`,
    '-device', 'isa-serial,chardev=serial0',
    ...(vm.agent
      ? [
          '-chardev', `socket,path=${run}.qga,server=on,wait=off,id=qga0`,
          '-device', 'virtio-serial,id=qga0,bus=pci.0,addr=0x8',
          '-device', 'virtserialport,chardev=qga0,name=org.qemu.guest_agent.0',
        ]
      : []),
    ...vm.disks.flatMap((disk, index) => [...controller(disk.key), ...drive(disk, vm.shape), '-device', device(disk, vm.shape, 100 + index)]),
    '-machine', `type=${machineOf(vm.shape)},hpet=off`,
    ...vm.args,
  ]
}

const indexOf = (key: string): number => Number(key.replace(/\D+/, ''))
const isScsi = (key: string): boolean => key.startsWith('scsi')
/** The iothread of a disk. */
export const iothreadOf = (key: string): string => (isScsi(key) ? `iothread-virtioscsi${indexOf(key)}` : `iothread-${key}`)
const hex = (value: number): string => `0x${value.toString(16)}`

const controller = (key: string): string[] =>
  isScsi(key) ? ['-device', `virtio-scsi-pci,id=virtioscsi${indexOf(key)},bus=pci.3,addr=${hex(indexOf(key) + 1)},iothread=${iothreadOf(key)}`] : []

const drive = (disk: VmDisk, shape: VmShape): string[] => (shape === '8.4' ? ['-drive', legacyDrive(disk)] : ['-blockdev', JSON.stringify(blockdev(disk))])

const legacyDrive = ({ key, path, format, discard }: VmDisk): string =>
  `file=${path.replaceAll(',', ',,')},if=none,id=drive-${key},${discard ? 'discard=on,' : ''}format=${format},cache=none,aio=io_uring,detect-zeroes=${discard ? 'unmap' : 'on'}`

const blockdev = ({ key, path, format, discard }: VmDisk): Record<string, unknown> => {
  const hash = createHash('sha256').update(`drive-${key}`).update(path).digest('hex').slice(0, 30)
  const common = { cache: { direct: true, 'no-flush': false }, 'detect-zeroes': discard ? 'unmap' : 'on', discard: discard ? 'unmap' : 'ignore', 'read-only': false }
  const top = { ...common, cache: undefined } // JSON leaves it out: Proxmox gives the top node no cache
  const driver = path.startsWith('/dev/') ? 'host_device' : 'file'
  const file = { ...common, driver, aio: 'io_uring', filename: path, 'node-name': `e${hash}` }
  return { ...top, driver: 'throttle', file: { ...common, driver: format, file, 'node-name': `f${hash}` }, 'node-name': `drive-${key}`, 'throttle-group': `throttle-drive-${key}` }
}

const device = ({ key, shareRw }: VmDisk, shape: VmShape, bootIndex: number): string => {
  const tail = `${shape === '9.x' ? ',write-cache=on' : ''}${shareRw ? ',share-rw=on' : ''}`
  return isScsi(key)
    ? `scsi-hd,bus=virtioscsi${indexOf(key)}.0,channel=0,scsi-id=0,lun=${indexOf(key)},drive=drive-${key},id=${key},device_id=drive-${key},bootindex=${bootIndex}${tail}`
    : `virtio-blk-pci,drive=drive-${key},id=${key},bus=pci.0,addr=${hex(10 + indexOf(key))},iothread=${iothreadOf(key)},bootindex=${bootIndex}${tail}`
}
