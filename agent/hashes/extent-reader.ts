import { CdpError } from '../../core/errors/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import { openReadableMirror, splitByMap } from '../mirror/index.ts'
import type { DataMap, ReadableMirror } from '../mirror/index.ts'
import { RecoveryPoint, readBaseState } from '../recovery/index.ts'
import type { PointResources, StatusExtent } from '../recovery/index.ts'

/** What hashes are made of: a disk's bytes and holes as of one moment of the replica. */
export type ExtentReader = AsyncDisposable & {
  readonly disks: readonly DiskEntry[]
  blockStatus(disk: number, offsetBytes: number, lengthBytes: number): Promise<StatusExtent[]>
  read(disk: number, offsetBytes: number, lengthBytes: number): Promise<Uint8Array[]>
}

/**
 * The replica of a VM as of `seq`; while its base is not complete, the mirrors as they are.
 * @throws CdpError NOT_FOUND if the history does not hold `seq`, JOURNAL_DAMAGED
 */
export const openExtentReader = async (vmDirectory: string, seq: number, resources: PointResources): Promise<ExtentReader> => {
  const base = await readBaseState(vmDirectory)
  return base.baseComplete ? RecoveryPoint.open({ ...resources, vmDirectory, seq }) : new MirrorsReader(vmDirectory, base.disks, resources)
}

/** The mirrors of a first copy. Holes are those of the moment in which they were first asked for: what is written later was captured (docs/decisions/delta-sync.md). */
class MirrorsReader implements ExtentReader {
  readonly disks: readonly DiskEntry[]
  readonly #vmDirectory: string
  readonly #resources: PointResources
  readonly #mirrors = new Map<number, Promise<ReadableMirror>>()
  readonly #maps = new Map<number, Promise<DataMap>>()

  constructor(vmDirectory: string, disks: readonly DiskEntry[], resources: PointResources) {
    this.#vmDirectory = vmDirectory
    this.disks = disks
    this.#resources = resources
  }

  async blockStatus(disk: number, offsetBytes: number, lengthBytes: number): Promise<StatusExtent[]> {
    const map = this.#maps.get(disk) ?? this.#mirror(disk).then((mirror) => mirror.dataMap())
    this.#maps.set(disk, map)
    const extents: StatusExtent[] = []
    splitByMap(await map, offsetBytes, offsetBytes + lengthBytes, (bytes, isHole) => extents.push({ lengthBytes: bytes, isHole }))
    return extents
  }

  async read(disk: number, offsetBytes: number, lengthBytes: number): Promise<Uint8Array[]> {
    const buffer = Buffer.allocUnsafeSlow(lengthBytes)
    const mirror = await this.#mirror(disk)
    await this.#resources.gate.run(() => mirror.read(offsetBytes, buffer))
    return [buffer]
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#maps.clear()
    const mirrors = [...this.#mirrors.values()]
    this.#mirrors.clear()
    for (const opened of await Promise.allSettled(mirrors)) if (opened.status === 'fulfilled') await opened.value[Symbol.asyncDispose]()
  }

  #mirror(disk: number): Promise<ReadableMirror> {
    let mirror = this.#mirrors.get(disk)
    if (mirror === undefined) {
      if (!this.disks.some((one) => one.disk === disk)) throw new CdpError('BAD_INPUT', 'the VM has no such disk', { context: { disk } })
      mirror = openReadableMirror(this.#vmDirectory, disk, this.#resources.files)
      this.#mirrors.set(disk, mirror)
    }
    return mirror
  }
}
