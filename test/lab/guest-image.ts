import { createHash } from 'node:crypto'
import { existsSync, globSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { basename } from 'node:path'
import { CdpError } from '../../core/errors/index.ts'
import { cpioArchive, type CpioEntry } from './cpio.ts'
import { tool } from './process.ts'
import { labCacheDir, projectDir } from './project.ts'

export type GuestImage = { kernel: string; initrd: string; kernelVersion: string }

const wantedModules = ['virtio_pci', 'virtio_scsi', 'sd_mod', 'virtio_blk', 'virtio_console', 'button', 'evdev']
const programs = ['journal-lib', 'journal-writer', 'journal-record', 'documents', 'ransomware', 'io-gap']

/**
 * Debian's cloud kernel as scripts/setup unpacked it and an initramfs of busybox, the modules that the kernel lacks, and test/lab/guest.
 * Kept below .cache/lab under the digest of its content. `kernelTree` is another unpacked kernel package.
 */
export const guestImage = async (kernelTree?: string): Promise<GuestImage> => {
  const tree = kernelTree ?? `${projectDir()}/.cache/debian/kernel`
  const [kernel] = globSync(`${tree}/boot/vmlinuz-*`)
  if (!kernel) throw new CdpError('NOT_FOUND', `no kernel below ${tree}/boot`, { hint: 'run scripts/setup' })
  const kernelVersion = basename(kernel).slice('vmlinuz-'.length)
  const entries = [...(await moduleEntries(tree, kernelVersion)), ...programEntries()]
  const archive = cpioArchive(entries)
  const initrd = `${labCacheDir()}/initrd-${kernelVersion}-${createHash('sha256').update(archive).digest('hex').slice(0, 16)}`
  if (!existsSync(initrd)) {
    writeFileSync(`${initrd}.${process.pid}`, archive)
    renameSync(`${initrd}.${process.pid}`, initrd)
  }
  return { kernel, initrd, kernelVersion }
}

/** The wanted modules and what they need, in an order in which insmod takes them. What the kernel has built in has no file. */
const moduleEntries = async (tree: string, version: string): Promise<CpioEntry[]> => {
  const files = new Map(globSync(`${tree}/{lib,usr/lib}/modules/${version}/kernel/**/*.ko{,.xz}`).map((path) => [moduleName(path), path]))
  const order: string[] = []
  const add = async (name: string): Promise<void> => {
    const path = files.get(name)
    if (!path || order.includes(name)) return
    const { stdout } = await tool('modinfo', ['-F', 'depends', path])
    for (const needed of stdout.trim().split(',').filter(Boolean)) await add(needed.replaceAll('-', '_'))
    order.push(name)
  }
  for (const name of wantedModules) await add(name)
  const contents = await Promise.all(order.map((name) => unpacked(files.get(name)!)))
  return [
    ...['lib', 'lib/modules'].map((name) => ({ name, mode: 0o040755 })),
    ...order.map((name, index) => ({ name: `lib/modules/${name}.ko`, mode: 0o100644, content: contents[index] })),
    { name: 'lib/modules/order', mode: 0o100644, content: Buffer.from(order.map((name) => `${name}.ko\n`).join('')) },
  ]
}

const moduleName = (path: string): string => basename(path).replace(/\.ko(\.xz)?$/, '').replaceAll('-', '_')

const unpacked = async (path: string): Promise<Buffer> => {
  if (!path.endsWith('.xz')) return readFileSync(path)
  const target = `${labCacheDir()}/${basename(path, '.xz')}.${process.pid}`
  await tool('sh', ['-c', 'xz -dc "$1" >"$2"', '-', path, target])
  const content = readFileSync(target)
  await tool('rm', [target])
  return content
}

const programEntries = (): CpioEntry[] => {
  const guest = (name: string): Buffer => readFileSync(`${projectDir()}/test/lab/guest/${name}`)
  const applets = ['sh', ...appletNames()]
  return [
    ...['bin', 'lab', 'lab/bin', 'dev', 'proc', 'sys', 'run', 'tmp', 'mnt', 'root', 'etc', 'etc/acpi', 'etc/acpi/PWRF'].map((name) => ({ name, mode: 0o040755 })),
    { name: 'dev/console', mode: 0o020600, device: [5, 1] },
    { name: 'bin/busybox', mode: 0o100755, content: readFileSync('/bin/busybox') },
    ...[...new Set(applets)].map((name) => ({ name: `bin/${name}`, mode: 0o120777, content: Buffer.from('busybox') })),
    { name: 'init', mode: 0o100755, content: guest('init') },
    { name: 'lab/channel', mode: 0o100755, content: guest('channel') },
    { name: 'etc/acpi/PWRF/00000080', mode: 0o100755, content: guest('power-button') },
    ...programs.map((name) => ({ name: `lab/bin/${name}`, mode: 0o100755, content: guest(name) })),
  ]
}

/** The applets that the guest's scripts and the tests' commands use. */
const appletNames = (): string[] =>
  `[ acpid ash awk base64 basename blkdiscard blockdev cat chmod cksum clear cmp cp cut date dd df dirname dmesg du echo egrep env expr fallocate false find
  free fsfreeze fstrim grep gunzip gzip head hexdump hostname id insmod kill killall ln ls lsmod md5sum mkdir mkfifo mke2fs mknod mktemp mount mountpoint mv nproc od
  pidof poweroff printf ps pwd readlink realpath reboot rm rmdir sed seq setsid sha256sum sha1sum shuf sleep sort stat stty sync tail tar tee test time timeout
  touch tr true truncate tty umount uname uniq uptime usleep wc xargs yes`.split(/\s+/)
