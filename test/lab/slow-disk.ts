import { mkdirSync, rmSync } from 'node:fs'
import { FuseDisk } from './fuse-disk.ts'
import { tool } from './process.ts'

const GROUP = '/objects/pace'

/** A file system on a disk that gets slow: ext4 over qemu-storage-daemon with a throttle in between. */
export class SlowDisk implements AsyncDisposable {
  readonly path: string
  readonly #disk: FuseDisk
  readonly #stack: AsyncDisposableStack

  private constructor(path: string, disk: FuseDisk, stack: AsyncDisposableStack) {
    this.path = path
    this.#disk = disk
    this.#stack = stack
  }

  /** @param synchronous every write waits for the disk, none for memory only */
  static async mount(path: string, sizeBytes: number, { synchronous = false } = {}): Promise<SlowDisk> {
    await using stack = new AsyncDisposableStack()
    const backing = `${path}.img`
    mkdirSync(path, { recursive: true })
    stack.defer(() => rmSync(backing, { force: true }))
    await tool('truncate', ['-s', String(sizeBytes), backing])
    const nodes = ['--object', 'throttle-group,id=pace', '--blockdev', 'throttle,node-name=paced,throttle-group=pace,file=file']
    const disk = stack.use(await FuseDisk.start({ backing, nodes, top: 'paced' }))
    await tool('mkfs.ext4', ['-q', '-E', 'lazy_itable_init=0,lazy_journal_init=0', disk.loop])
    await tool('mount', ['-o', synchronous ? 'sync,noatime' : 'noatime', disk.loop, path])
    stack.defer(async () => void (await tool('umount', [path])))
    const slow = new SlowDisk(path, disk, stack.move())
    slow.#stack.defer(() => slow.fast())
    return slow
  }

  /** So many operations a second from now on. */
  async slow(operationsPerSec: number): Promise<void> {
    await this.#disk.monitor.run('qom-set', { path: GROUP, property: 'limits', value: { 'iops-total': operationsPerSec } })
  }

  async fast(): Promise<void> {
    await this.slow(0)
  }

  /** What uses it has ended before. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack.disposeAsync()
  }
}
