import { CdpError } from '../../core/errors/index.ts'
import { decodeFramePayload, RecordKind } from '../../core/record/index.ts'
import type { DiskEntry, Frame } from '../../core/record/index.ts'
import type { MirrorDisk } from './mirror-disk.ts'
import type { MirrorStorage } from './mirror-storage.ts'

/** The disk that a file of the mirror belongs to; undefined for another file. */
export const diskOfMirrorFile = (name: string): number | undefined => (/^[0-9]{1,5}\.raw$/.test(name) ? Number.parseInt(name, 10) : undefined)

/** The mirror disks of one VM, open for writing. Records are applied in order; one caller at a time. */
export class MirrorSet implements AsyncDisposable {
  readonly #disks: Map<number, MirrorDisk>

  private constructor(disks: Map<number, MirrorDisk>) {
    this.#disks = disks
  }

  /** Opens, and creates where missing, the mirror of every disk. The caller makes the names durable. */
  static async open(storage: MirrorStorage, disks: readonly DiskEntry[]): Promise<MirrorSet> {
    await using opened = new AsyncDisposableStack()
    const map = new Map<number, MirrorDisk>()
    for (const one of disks) map.set(one.disk, opened.use(await storage.open(one)))
    opened.move()
    return new MirrorSet(map)
  }

  /** @throws CdpError NOT_FOUND */
  disk(disk: number): MirrorDisk {
    const found = this.#disks.get(disk)
    if (found === undefined) throw new CdpError('NOT_FOUND', 'no mirror of that disk', { context: { disk } })
    return found
  }

  /**
   * Applies every record of a checked frame, in order; applying one again is harmless as long as all that followed it is applied
   * again too. Records that continue each other on disk and in the payload become one write. Nothing is durable before `datasync`.
   */
  async apply(frame: Frame): Promise<void> {
    const { table } = frame
    const payload = decodeFramePayload(frame.header, frame.stored)
    let index = 0
    while (index < table.count) {
      const kind = table.kind(index)
      if (kind === RecordKind.write || kind === RecordKind.sync) {
        const first = index
        let lengthBytes = table.lengthBytes(first)
        index++
        while (index < table.count && continues(frame, index, first, lengthBytes)) lengthBytes += table.lengthBytes(index++)
        const start = table.payloadOffset(first)
        await this.disk(table.disk(first)).write(table.offsetBytes(first), [payload.subarray(start, start + lengthBytes)], lengthBytes)
        continue
      }
      if (kind === RecordKind.zero || kind === RecordKind.discard || kind === RecordKind.syncZero) {
        await this.disk(table.disk(index)).zero(table.offsetBytes(index), table.lengthBytes(index))
      } else if (kind === RecordKind.resize) {
        await this.disk(table.disk(index)).grow(table.offsetBytes(index))
      }
      index++
    }
  }

  /** Makes all that was applied durable. */
  async datasync(): Promise<void> {
    for (const disk of this.#disks.values()) await disk.datasync()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const disk of this.#disks.values()) await disk[Symbol.asyncDispose]()
  }
}

const continues = ({ table }: Frame, index: number, first: number, lengthBytes: number): boolean => {
  const kind = table.kind(index)
  return (
    (kind === RecordKind.write || kind === RecordKind.sync) &&
    table.disk(index) === table.disk(first) &&
    table.offsetBytes(index) === table.offsetBytes(first) + lengthBytes &&
    table.payloadOffset(index) === table.payloadOffset(first) + lengthBytes
  )
}
