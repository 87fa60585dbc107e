import { CdpError } from '../../core/errors/index.ts'
import { NbdServer } from '../../core/nbd/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import { FilePool, PageCache } from '../index/index.ts'
import type { IndexDamage } from '../index/index.ts'
import { FrameCache } from './frame-cache.ts'
import type { Pin, PinRegistry } from './pins.ts'
import { PointExport } from './point-export.ts'
import { ReadGate } from './read-gate.ts'
import { RecoveryPoint } from './recovery-point.ts'
import type { PointResources } from './recovery-point.ts'

export type PointServerOptions = {
  /** Unix socket, at most 107 bytes. */
  socketPath: string
  socketMode?: number
  /** Memory for pages of index runs, all points together. Default 32 MiB. */
  pageCacheBytes?: number
  /** Memory for decoded frames, all points together. Default 64 MiB. */
  frameCacheBytes?: number
  /** Reads under way at once, all points together. Default 8. */
  maxReads?: number
  /** Told what is being read, so that promotion stays below. */
  pins?: PinRegistry
  now?: () => number
  onIndexDamage?: (vmDirectory: string, damage: IndexDamage) => void
  onJournalDamage?: (vmDirectory: string, error: CdpError) => void
  onConnectionError?: (error: CdpError) => void
}

/** One VM of a point. `disks`: as of `seq`, if they differ from those of vm.json. */
export type PointVm = { vm: string; vmDirectory: string; seq: number; disks?: readonly DiskEntry[] }
export type OpenPointRequest = { pointId: string; vms: readonly PointVm[] }

export type ServedDisk = { vm: string; seq: number; disk: number; key: string; sizeBytes: number; exportName: string; uri: string; clients: number }
export type OpenedPoint = { pointId: string; openedAtUnixMs: number; disks: ServedDisk[] }

type Entry = { pointId: string; openedAtUnixMs: number; points: AsyncDisposableStack; exports: { served: PointExport; vm: PointVm; disk: DiskEntry }[] }

const NAME = /^[A-Za-z0-9][A-Za-z0-9._:-]{0,99}$/

/**
 * Serves recovery points over NBD on one unix socket, read-only, several at once; the export of a disk is called
 * pointId/vm/key. It works on the VMs' files alone, so it may live in the agent or in a process of its own.
 */
export class PointServer {
  readonly #options: PointServerOptions
  readonly #resources: PointResources
  readonly #entries = new Map<string, Entry>()
  readonly #opening = new Set<string>()
  readonly #exports = new Map<string, PointExport>()
  #server: NbdServer | undefined

  private constructor(options: PointServerOptions) {
    this.#options = options
    this.#resources = {
      pages: new PageCache(options.pageCacheBytes ?? 32 * 1024 * 1024),
      frames: new FrameCache(options.frameCacheBytes ?? 64 * 1024 * 1024),
      gate: new ReadGate(options.maxReads ?? 8),
      files: new FilePool(256),
    }
  }

  /** @throws CdpError CONFLICT if somebody serves the socket already, IO */
  static async listen(options: PointServerOptions): Promise<PointServer> {
    const server = new PointServer(options)
    server.#server = await NbdServer.listen({
      address: { path: options.socketPath },
      socketMode: options.socketMode,
      findExport: (name) => server.#exports.get(name),
      listExports: () => [...server.#exports.values()],
      onConnectionError: options.onConnectionError,
    })
    return server
  }

  /**
   * Opens a point and serves every disk of its VMs.
   * @throws CdpError BAD_INPUT, CONFLICT if a point of that id is open, and what RecoveryPoint.open throws; nothing is left open then
   */
  async openPoint(request: OpenPointRequest): Promise<OpenedPoint> {
    const { pointId, vms } = request
    if (this.#server === undefined) throw new CdpError('CLOSED', 'the point server was closed')
    for (const name of [pointId, ...vms.map((one) => one.vm)]) if (!NAME.test(name)) throw new CdpError('BAD_INPUT', `"${name}" cannot be a part of an export's name`)
    if (vms.length === 0 || new Set(vms.map((one) => one.vm)).size !== vms.length) throw new CdpError('BAD_INPUT', 'a point needs at least one VM, and each once')
    if (this.#entries.has(pointId) || this.#opening.has(pointId)) throw new CdpError('CONFLICT', `recovery point ${pointId} is open already`)
    this.#opening.add(pointId)
    try {
      await using points = new AsyncDisposableStack()
      const exports: Entry['exports'] = []
      const opened = await Promise.allSettled(vms.map(async (vm) => {
        // The pin comes first: from here on the base stays where this point can use it.
        const pin: Pin | undefined = this.#options.pins?.pin(vm.vmDirectory, vm.seq, `recovery point ${pointId}`)
        if (pin !== undefined) points.defer(() => pin.release())
        const point = points.use(await this.#openVm(vm))
        for (const disk of point.disks) exports.push({ served: new PointExport(`${pointId}/${vm.vm}/${disk.key}`, point, disk), vm, disk })
      }))
      const failed = opened.find((one) => one.status === 'rejected')
      if (failed !== undefined) throw failed.reason
      if (this.#server === undefined) throw new CdpError('CLOSED', 'the point server was closed')
      for (const { disk } of exports) if (!NAME.test(disk.key)) throw new CdpError('BAD_INPUT', `"${disk.key}" cannot be a part of an export's name`)
      exports.sort((a, b) => (a.served.name < b.served.name ? -1 : 1))
      const entry: Entry = { pointId, openedAtUnixMs: (this.#options.now ?? Date.now)(), points: points.move(), exports }
      this.#entries.set(pointId, entry)
      for (const { served } of exports) this.#exports.set(served.name, served)
      return this.#describe(entry)
    } finally {
      this.#opening.delete(pointId)
    }
  }

  /**
   * Ends a point. Clients still connected get errors from then on, hence only with `force`.
   * @returns false if there is no such point
   * @throws CdpError CONFLICT if it has clients
   */
  async closePoint(pointId: string, how: { force?: boolean } = {}): Promise<boolean> {
    const entry = this.#entries.get(pointId)
    if (entry === undefined) return false
    const clients = entry.exports.reduce((sum, { served }) => sum + served.clientCount, 0)
    if (clients > 0 && how.force !== true) {
      throw new CdpError('CONFLICT', `recovery point ${pointId} has ${clients} client(s)`, { hint: 'stop what reads it, or close it by force', context: { clients } })
    }
    this.#entries.delete(pointId)
    for (const { served } of entry.exports) this.#exports.delete(served.name)
    await entry.points.disposeAsync()
    return true
  }

  /** A segment's file was removed: nothing keeps its blocks any longer. */
  forget(path: string): Promise<void> {
    return this.#resources.files.forget(path)
  }

  /** A VM's replica goes, and no point of it is open: another one may come in its directory. */
  async forgetVm(vmDirectory: string): Promise<void> {
    this.#resources.frames.forgetUnder(vmDirectory)
    await this.#resources.files.forgetUnder(vmDirectory)
  }

  list(): OpenedPoint[] {
    return [...this.#entries.values()].map((entry) => this.#describe(entry))
  }

  /** Closes every point and the socket. Idempotent. */
  async [Symbol.asyncDispose](): Promise<void> {
    const server = this.#server
    this.#server = undefined
    await server?.[Symbol.asyncDispose]()
    for (const pointId of [...this.#entries.keys()]) await this.closePoint(pointId, { force: true })
    await this.#resources.files[Symbol.asyncDispose]()
  }

  async #openVm(vm: PointVm): Promise<RecoveryPoint> {
    const { vmDirectory, seq, disks } = vm
    const { onIndexDamage, onJournalDamage } = this.#options
    const point = await RecoveryPoint.open({
      ...this.#resources, vmDirectory, seq, disks,
      onIndexDamage: (damage) => onIndexDamage?.(vmDirectory, damage),
      onJournalDamage: (error) => onJournalDamage?.(vmDirectory, error),
    })
    if (point.vm === vm.vm) return point
    await point[Symbol.asyncDispose]()
    throw new CdpError('BAD_INPUT', `the directory holds the replica of ${point.vm}, not of ${vm.vm}`, { context: { vmDirectory } })
  }

  #describe(entry: Entry): OpenedPoint {
    const disks = entry.exports.map(({ served, vm, disk }) => ({
      vm: vm.vm, seq: vm.seq, disk: disk.disk, key: disk.key, sizeBytes: disk.sizeBytes, exportName: served.name,
      uri: nbdUri(served.name, this.#options.socketPath), clients: served.clientCount,
    }))
    return { pointId: entry.pointId, openedAtUnixMs: entry.openedAtUnixMs, disks }
  }
}

/** The NBD URI of an export on a unix socket, as QEMU and libnbd read it. */
export const nbdUri = (exportName: string, socketPath: string): string =>
  `nbd+unix:///${exportName.split('/').map(encodeURIComponent).join('/')}?socket=${socketPath.split('/').map(encodeURIComponent).join('/')}`
