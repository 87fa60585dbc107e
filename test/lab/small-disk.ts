import { mkdirSync, rmSync, statfsSync } from 'node:fs'
import { CdpError } from '../../core/errors/index.ts'
import { runTool, tool } from './process.ts'

/** A file system of its own size in memory, to be filled. */
export class SmallDisk implements AsyncDisposable {
  readonly path: string

  private constructor(path: string) {
    this.path = path
  }

  static async mount(path: string, sizeBytes: number): Promise<SmallDisk> {
    mkdirSync(path, { recursive: true })
    await tool('mount', ['-t', 'tmpfs', '-o', `size=${sizeBytes}`, 'cdp-small-disk', path])
    return new SmallDisk(path)
  }

  /** Takes all that is free, whatever others write meanwhile. */
  async fill(): Promise<void> {
    await runTool('dd', ['if=/dev/zero', `of=${this.path}/ballast`, 'bs=1M'])
    if (statfsSync(this.path).bavail > 0) throw new CdpError('IO', `${this.path} could not be filled`)
  }

  empty(): void {
    rmSync(`${this.path}/ballast`, { force: true })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await tool('umount', ['-l', this.path])
  }
}
