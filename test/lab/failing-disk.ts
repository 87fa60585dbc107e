import { mkdirSync, rmSync } from 'node:fs'
import { CdpError } from '../../core/errors/index.ts'
import { FuseDisk } from './fuse-disk.ts'
import { tool } from './process.ts'

const SECTOR_BYTES = 512
const BLOCK_BYTES = 4096
const EIO = 5

/** A file system on a disk of which a block cannot be read, or once not be written. */
export class FailingDisk implements AsyncDisposable {
  readonly path: string
  readonly #backing: string
  #disk: FuseDisk | undefined

  private constructor(path: string) {
    this.path = path
    this.#backing = `${path}.img`
  }

  static async mount(path: string, sizeBytes: number): Promise<FailingDisk> {
    const disk = new FailingDisk(path)
    mkdirSync(path, { recursive: true })
    try {
      await tool('truncate', ['-s', String(sizeBytes), disk.#backing])
      await tool('mkfs.ext4', ['-q', '-b', String(BLOCK_BYTES), '-E', 'lazy_itable_init=0,lazy_journal_init=0', disk.#backing])
      await disk.#mount([])
      return disk
    } catch (error) {
      await disk[Symbol.asyncDispose]()
      throw error
    }
  }

  /** From now on the block of a file that holds this byte cannot be read (EIO). Nobody has a file open. */
  async failReads(file: string, offsetBytes: number): Promise<void> {
    await this.#failAt(file, offsetBytes, 'iotype=read')
  }

  /** The next write of the block of a file that holds this byte fails (EIO), the one after that does not. Nobody has a file open. */
  async failWriteOnce(file: string, offsetBytes: number): Promise<void> {
    await this.#failAt(file, offsetBytes, 'iotype=write', 'once=on')
  }

  /** As after a new boot: nothing is remembered of what was read or written. Nobody has a file open. */
  async remount(): Promise<void> {
    await this.#unmount()
    await this.#mount([])
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#unmount()
    rmSync(this.#backing, { force: true })
  }

  async #failAt(file: string, offsetBytes: number, ...how: string[]): Promise<void> {
    const sector = (await blockOf(file, Math.floor(offsetBytes / BLOCK_BYTES))) * (BLOCK_BYTES / SECTOR_BYTES)
    await this.#unmount()
    const rule = ['event=none', `errno=${EIO}`, `sector=${sector}`, ...how].map((one) => `inject-error.0.${one}`)
    await this.#mount(['--blockdev', `blkdebug,node-name=failing,image=file,${rule.join(',')}`])
  }

  async #mount(nodes: readonly string[]): Promise<void> {
    this.#disk = await FuseDisk.start({ backing: this.#backing, nodes, top: nodes.length === 0 ? 'file' : 'failing' })
    await tool('mount', ['-o', 'noatime', this.#disk.loop, this.path])
  }

  async #unmount(): Promise<void> {
    const disk = this.#disk
    this.#disk = undefined
    if (disk === undefined) return
    await tool('umount', [this.path])
    await disk[Symbol.asyncDispose]()
  }
}

/** Where on its disk a block of a file lies. */
const blockOf = async (file: string, block: number): Promise<number> => {
  const { stdout } = await tool('filefrag', ['-v', '-b' + String(BLOCK_BYTES), file])
  for (const [, first, last, physical] of stdout.matchAll(/^\s*\d+:\s+(\d+)\.\.\s*(\d+):\s+(\d+)\.\./gm)) {
    if (block >= Number(first) && block <= Number(last)) return Number(physical) + block - Number(first)
  }
  throw new CdpError('NOT_FOUND', `${file} has no block ${block} on its disk: ${stdout}`)
}
