import { FilePool, PageCache } from '../index/index.ts'
import { FrameCache, ReadGate } from '../recovery/index.ts'
import type { PointResources } from '../recovery/index.ts'
import { openExtentReader } from './extent-reader.ts'
import type { ExtentReader } from './extent-reader.ts'

const MAX_OPEN = 16
const newResources = (): PointResources => ({ pages: new PageCache(16 * 1024 * 1024), frames: new FrameCache(32 * 1024 * 1024), gate: new ReadGate(2), files: new FilePool(64) })

/**
 * Readers that are open, by key, least recently used first out. With the last one of a VM everything of it that was cached goes: open files would keep
 * removed segments on the disk, and paths come again when a replica is deleted and made anew.
 */
export class ReaderCache implements AsyncDisposable {
  readonly #readers = new Map<string, { reader: ExtentReader; vmDirectory: string }>()
  #resources: PointResources | undefined

  /** @throws as openExtentReader */
  async get(key: string, vmDirectory: string, seq: number): Promise<ExtentReader> {
    const known = this.#readers.get(key)
    if (known !== undefined) {
      this.#readers.delete(key)
      this.#readers.set(key, known)
      return known.reader
    }
    this.#resources ??= newResources()
    const reader = await openExtentReader(vmDirectory, seq, this.#resources)
    this.#readers.set(key, { reader, vmDirectory })
    for (const oldest of this.#readers.keys()) {
      if (this.#readers.size <= MAX_OPEN) break
      await this.close(oldest)
    }
    return reader
  }

  /** One that is not open is no error. */
  async close(key: string): Promise<void> {
    const known = this.#readers.get(key)
    const resources = this.#resources
    if (known === undefined || resources === undefined) return
    this.#readers.delete(key)
    await known.reader[Symbol.asyncDispose]()
    const { vmDirectory } = known
    if ([...this.#readers.values()].some((other) => other.vmDirectory === vmDirectory)) return
    resources.frames.forgetUnder(vmDirectory)
    await resources.files.forgetUnder(vmDirectory)
    if (this.#readers.size > 0) return
    this.#resources = undefined
    await resources.files[Symbol.asyncDispose]()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const key of [...this.#readers.keys()]) await this.close(key)
  }
}
