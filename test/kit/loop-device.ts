import { execFile } from 'node:child_process'
import { truncate, writeFile } from 'node:fs/promises'
import { promisify } from 'node:util'

const run = promisify(execFile)

/** A block device of that size over a file. Needs root. */
export class LoopDevice implements AsyncDisposable {
  readonly path: string
  readonly #file: string

  private constructor(path: string, file: string) {
    this.path = path
    this.#file = file
  }

  static async attach(file: string, sizeBytes: number, how: { sectorBytes?: number } = {}): Promise<LoopDevice> {
    await writeFile(file, '', { flag: 'a' })
    await truncate(file, sizeBytes)
    const { stdout } = await run('losetup', ['--find', '--show', '--sector-size', String(how.sectorBytes ?? 512), file])
    return new LoopDevice(stdout.trim(), file)
  }

  /** As a volume that its operator extends. */
  async grow(sizeBytes: number): Promise<void> {
    await truncate(this.#file, sizeBytes)
    await run('losetup', ['--set-capacity', this.path])
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await run('losetup', ['--detach', this.path])
  }
}
