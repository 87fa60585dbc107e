import { mkdirSync, rmSync } from 'node:fs'
import { CdpError } from '../../core/errors/index.ts'
import { checkExt4, checkPrefix, extractExt4, tool, type PrefixReport } from '../lab/index.ts'
import { until, type Sites } from '../lab/sites.ts'

export type PointImage = { vmId: number; key: string; path: string; sha256: string }

/** A directory of a journal writer on a recovered disk: folder '' is the root of its file system. */
export type JournalPlace = { vmId: number; key: string; folder?: string }

/** Every disk of a recovery point, copied out through its NBD exports to raw files. */
export class PointImages implements Disposable {
  readonly checkpointId: string
  readonly images: readonly PointImage[]
  readonly #dir: string

  private constructor(checkpointId: string, dir: string, images: PointImage[]) {
    this.checkpointId = checkpointId
    this.#dir = dir
    this.images = images
  }

  /** Opens the point, copies, closes it. `sha256` is over the whole disk, holes as zeros. */
  static async copy(sites: Sites, vpg: string, checkpointId: string): Promise<PointImages> {
    const point = await sites.openPoint(vpg, checkpointId)
    const dir = `${sites.rootDir}/images-${point.pointId}`
    mkdirSync(dir)
    const images = await Promise.all(point.disks.map(async ({ vmId, key, uri }) => {
      const path = `${dir}/${vmId}-${key}.raw`
      await tool('qemu-img', ['convert', '-f', 'raw', '-O', 'raw', uri, path], { deadlineMs: 120_000 })
      const { stdout } = await tool('sha256sum', [path], { deadlineMs: 120_000 })
      return { vmId, key, path, sha256: stdout.slice(0, 64) }
    }))
    await closeQuiet(sites, point.pointId)
    return new PointImages(checkpointId, dir, images)
  }

  /** One line for each disk whose ext4 is not consistent after the replay of its own journal. */
  async ext4Problems(): Promise<string[]> {
    const reports = await Promise.all(this.images.map(async ({ vmId, key, path }) => {
      const { clean, report } = await checkExt4(path, this.#dir)
      return clean ? [] : [`VM ${vmId} ${key}: ${report}`]
    }))
    return reports.flat()
  }

  /** The records that a writer over these places left, judged together in this order. */
  async prefix(places: readonly JournalPlace[]): Promise<PrefixReport> {
    const texts: string[] = []
    for (const { vmId, key, folder = '' } of places) {
      const image = this.images.find((candidate) => candidate.vmId === vmId && candidate.key === key)
      if (image === undefined) throw new CdpError('NOT_FOUND', `the point has no disk ${key} of VM ${vmId}`)
      const target = `${this.#dir}/files`
      mkdirSync(target)
      await extractExt4(image.path, `${folder}/journal`, target)
      const { stdout } = await tool('sh', ['-c', 'cat "$1"/journal/*.log 2>/dev/null || true', '-', target])
      rmSync(target, { recursive: true })
      texts.push(stdout)
    }
    return checkPrefix(texts)
  }

  /** Digest by disk, to compare two copies. */
  digests(): Record<string, string> {
    return Object.fromEntries(this.images.map(({ vmId, key, sha256 }) => [`${vmId}/${key}`, sha256]))
  }

  [Symbol.dispose](): void {
    rmSync(this.#dir, { recursive: true, force: true })
  }
}

/** Closes a point as soon as the server has heard that its last reader left. */
export const closeQuiet = (sites: Sites, pointId: string): Promise<true> =>
  until(`point ${pointId} closes`, 10_000, async () => {
    try {
      await sites.closePoint(pointId)
      return true
    } catch (error) {
      if (error instanceof CdpError && error.code === 'CONFLICT') return undefined
      throw error
    }
  })
