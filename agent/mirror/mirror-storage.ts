import type { FileHandle } from 'node:fs/promises'
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError } from '../../core/errors/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import { holdDevice, isBlank, lookAtDevice, mustBeLargeEnough, zeroRange } from './block-device.ts'
import { FileMirror } from './file-mirror.ts'
import type { MirrorDisk } from './mirror-disk.ts'
import { readMirrorRecord, recordedDisks, writeMirrorRecord } from './mirror-record.ts'
import type { MirrorRecord, MirrorSpec } from './mirror-record.ts'
import { NbdMirror } from './nbd-mirror.ts'
import { checkQcow2, fileExists, makeQcow2 } from './qcow2-file.ts'
import { StorageDaemon } from './storage-daemon.ts'

export const mirrorFileName = (disk: number): string => `${disk}.raw`

/** The disk that a file of the mirror's directory belongs to, a mirror or the record of one; undefined for another file. */
export const diskOfMirrorFile = (name: string): number | undefined => (/^[0-9]{1,5}\.(?:raw|json)$/.test(name) ? Number.parseInt(name, 10) : undefined)

export type MirrorStorageOptions = {
  /** The VM's directory; mirrors, or what names them, stand in `mirror/` below it. */
  vmDirectory: string
  /** What a disk that has no mirror yet gets. Default: a file. */
  choose?: (disk: Pick<DiskEntry, 'disk' | 'key'>) => MirrorSpec
  log?: Logger
  /** Without progress for so long, a storage hangs. Default 60 s. */
  deadlineMs?: number
}

/** The mirrors of one VM: which there are, what they are, and how they are opened and made. One caller for each disk at a time. */
export class MirrorStorage implements AsyncDisposable {
  readonly directory: string
  readonly #options: MirrorStorageOptions
  readonly #deadlineMs: number
  readonly #devices = new Map<number, FileHandle>()
  readonly #daemon: StorageDaemon
  #starting: Promise<void> = Promise.resolve()

  constructor(options: MirrorStorageOptions) {
    this.#options = options
    this.#deadlineMs = options.deadlineMs ?? 60_000
    this.directory = join(options.vmDirectory, 'mirror')
    this.#daemon = new StorageDaemon({ directory: this.directory, log: options.log ?? silentLogger, prepare: (disk, record) => this.#prepare(disk, record) })
  }

  /** Of the storage daemon, if there is one. */
  get daemonPid(): number | undefined {
    return this.#daemon.pid
  }

  /** Begins to serve what there is, for recovery points: what cannot be served now is tried again. */
  start(): void {
    this.#starting = this.#start().catch((error: unknown) => this.#options.log?.error('the mirrors of a VM cannot be looked at', { directory: this.directory, error: String(error) }))
  }

  /** There is a mirror of that number, of a disk that is there or of one that was removed. */
  async exists(disk: number): Promise<boolean> {
    return (await fileExists(join(this.directory, mirrorFileName(disk)))) || (await readMirrorRecord(this.directory, disk)) !== undefined
  }

  /** What the mirror of a disk is, or will be. */
  async kindOf(disk: Pick<DiskEntry, 'disk' | 'key'>): Promise<MirrorSpec['kind']> {
    const record = await readMirrorRecord(this.directory, disk.disk)
    if (record !== undefined) return record.kind
    return (await this.exists(disk.disk)) ? 'file' : this.#choice(disk).kind
  }

  /**
   * What opening the mirrors of these disks would refuse, refused before anything is changed.
   * @throws CdpError NOT_FOUND (no such device or file), BAD_INPUT, CONFLICT (too small, in use, holds something that is not ours)
   */
  async check(disks: readonly DiskEntry[]): Promise<void> {
    for (const disk of disks) {
      const record = await readMirrorRecord(this.directory, disk.disk)
      if (record !== undefined) {
        if (record.kind === 'device') mustBeLargeEnough(record.path, (await this.#known(disk.disk, record)).sizeBytes, disk.sizeBytes)
        else if (record.ready && !(await fileExists(record.path))) throw lost(disk.disk, record)
      } else if (!(await this.exists(disk.disk))) await this.#checkNew(disk, this.#choice(disk))
    }
  }

  /** Opens the mirror of a disk, makes it if there is none, and lets it be as large as the disk. The caller makes its name durable. @throws as check; IO */
  async open(disk: Pick<DiskEntry, 'disk' | 'sizeBytes'> & { key?: string }): Promise<MirrorDisk> {
    const { directory } = this
    await mkdir(directory, { recursive: true })
    let record = await readMirrorRecord(directory, disk.disk)
    if (record === undefined) {
      const isNew = disk.key !== undefined && !(await this.exists(disk.disk))
      const spec: MirrorSpec = isNew ? this.#choice({ disk: disk.disk, key: disk.key ?? '' }) : { kind: 'file' }
      if (spec.kind === 'file') return FileMirror.open(join(directory, mirrorFileName(disk.disk)), disk.sizeBytes)
      record = await this.#begin({ key: disk.key ?? '', disk: disk.disk, sizeBytes: disk.sizeBytes }, spec)
    }
    if (!record.ready) record = await this.#make(disk.disk, record)
    const served = record
    await this.#daemon.serve(disk.disk, served)
    const mirror = await NbdMirror.open({
      directory, disk: disk.disk, deadlineMs: this.#deadlineMs, onBroken: (why) => this.#daemon.kill(why), resize: (sizeBytes) => this.#grow(disk.disk, sizeBytes),
    })
    try {
      await mirror.grow(disk.sizeBytes)
    } catch (error) {
      await mirror[Symbol.asyncDispose]()
      throw error
    }
    return mirror
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#daemon[Symbol.asyncDispose]()
    await this.#starting
    const devices = [...this.#devices.values()]
    this.#devices.clear()
    for (const device of devices) await device.close()
  }

  #choice(disk: Pick<DiskEntry, 'disk' | 'key'>): MirrorSpec {
    return this.#options.choose?.({ disk: disk.disk, key: disk.key }) ?? { kind: 'file' }
  }

  async #start(): Promise<void> {
    for (const disk of await recordedDisks(this.directory)) {
      const record = await readMirrorRecord(this.directory, disk)
      if (record?.ready !== true) continue
      await this.#daemon.serve(disk, record).catch((error: unknown) => {
        this.#options.log?.error('a mirror cannot be served', { directory: this.directory, disk, error: String(error), ...(error instanceof CdpError ? { hint: error.hint } : {}) })
      })
    }
  }

  async #checkNew(disk: DiskEntry, spec: MirrorSpec): Promise<void> {
    if (spec.kind === 'file') return
    const { path, claim } = spec
    if (spec.kind === 'qcow2') {
      if (!(await fileExists(path))) return
      if (claim !== true) throw notOurs(path)
      await checkQcow2(path, disk.sizeBytes)
      return
    }
    mustBeLargeEnough(path, (await lookAtDevice(path)).sizeBytes, disk.sizeBytes)
    await using device = await holdDevice(path)
    if (claim !== true && !(await isBlank(device))) throw notOurs(path)
  }

  /** The intent, durable before the storage is touched. */
  async #begin(disk: DiskEntry, spec: Exclude<MirrorSpec, { kind: 'file' }>): Promise<MirrorRecord> {
    await this.#checkNew(disk, spec)
    const { kind, path } = spec
    const claimed = kind === 'device' || (await fileExists(path))
    const identity = kind === 'device' ? (await lookAtDevice(path)).identity : undefined
    const record: MirrorRecord = { format: 1, kind, path, sizeBytes: disk.sizeBytes, ready: false, claimed, ...(identity === undefined ? {} : { identity }) }
    await writeMirrorRecord(this.directory, disk.disk, record)
    return record
  }

  async #make(disk: number, record: MirrorRecord): Promise<MirrorRecord> {
    if (!record.claimed) await makeQcow2(record.path, record.sizeBytes)
    const made = { ...record, ready: true }
    await writeMirrorRecord(this.directory, disk, made)
    this.#options.log?.info('a disk has its mirror', { directory: this.directory, disk, kind: record.kind, path: record.path })
    return made
  }

  async #grow(disk: number, sizeBytes: number): Promise<void> {
    const record = await readMirrorRecord(this.directory, disk)
    if (record === undefined) throw new CdpError('NOT_FOUND', 'no record of that mirror', { context: { disk } })
    if (record.kind === 'device') {
      mustBeLargeEnough(record.path, (await this.#known(disk, record)).sizeBytes, sizeBytes)
      const device = this.#devices.get(disk)
      if (device === undefined) throw new CdpError('CLOSED', 'the mirrors of this VM are closed')
      await zeroRange(device, record.sizeBytes, sizeBytes)
    }
    const grown = { ...record, sizeBytes: Math.max(record.sizeBytes, sizeBytes) }
    await this.#daemon.resize(disk, grown)
    await writeMirrorRecord(this.directory, disk, grown)
  }

  /** Before a storage is opened, each time: it is there, it is the same, and nobody else has it. */
  async #prepare(disk: number, record: MirrorRecord): Promise<void> {
    if (record.kind === 'qcow2') {
      if (!(await fileExists(record.path))) throw lost(disk, record)
      return
    }
    mustBeLargeEnough(record.path, (await this.#known(disk, record)).sizeBytes, record.sizeBytes)
    if (!this.#devices.has(disk)) this.#devices.set(disk, await holdDevice(record.path))
  }

  async #known(disk: number, record: MirrorRecord): Promise<{ sizeBytes: number }> {
    const found = await lookAtDevice(record.path)
    if (found.identity === record.identity) return found
    throw new CdpError('CONFLICT', `${record.path} is not the device that holds the mirror of disk ${disk}`, {
      hint: `Name the right one in ${join(this.directory, `${disk}.json`)}; it was "${record.identity ?? 'without identity'}".`, context: { disk, path: record.path, found: found.identity },
    })
  }
}

const notOurs = (path: string): CdpError =>
  new CdpError('CONFLICT', `${path} holds something already`, { hint: 'Name another one, or say "claim": true for it in mirrors of agent.json: the disk is compared with it then, and it is overwritten.', context: { path } })

const lost = (disk: number, record: MirrorRecord): CdpError =>
  new CdpError('NOT_FOUND', `the mirror of disk ${disk} is gone: there is no ${record.path}`, { hint: 'Mount the storage below it, or delete the replica of this VM and begin anew.', context: { disk, path: record.path } })
