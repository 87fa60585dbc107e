import { open } from 'node:fs/promises'
import type { FileHandle } from 'node:fs/promises'

type Entry = { handle: Promise<FileHandle>; users: number; forgotten: boolean }

/** Files open for reading, the least recently used closed first. Above `maxOpen` only while more than that are in use at once. */
export class ReadHandles implements AsyncDisposable {
  readonly #maxOpen: number
  readonly #entries = new Map<string, Entry>()

  constructor(maxOpen = 8) {
    this.#maxOpen = maxOpen
  }

  get openCount(): number {
    return this.#entries.size
  }

  /** Takes a file for reading until `release`. */
  async acquire(path: string): Promise<FileHandle> {
    let entry = this.#entries.get(path)
    if (entry === undefined) entry = { handle: open(path, 'r'), users: 0, forgotten: false }
    else this.#entries.delete(path)
    this.#entries.set(path, entry)
    entry.users++
    try {
      return await entry.handle
    } catch (error) {
      if (this.#entries.get(path) === entry) this.#entries.delete(path)
      throw error
    }
  }

  async release(path: string): Promise<void> {
    const entry = this.#entries.get(path)
    if (entry === undefined) return
    entry.users--
    if (entry.forgotten) await this.forget(path)
    if (this.#entries.size <= this.#maxOpen) return
    for (const [oldest, candidate] of this.#entries) {
      if (candidate.users > 0) continue
      this.#entries.delete(oldest)
      await (await candidate.handle).close()
      if (this.#entries.size <= this.#maxOpen) return
    }
  }

  /** A file was removed: its blocks are free once nobody has it open. */
  async forget(path: string): Promise<void> {
    const entry = this.#entries.get(path)
    if (entry === undefined) return
    if (entry.users > 0) {
      entry.forgotten = true
      return
    }
    this.#entries.delete(path)
    await (await entry.handle).close()
  }

  /** The caller has seen to it that nothing is in use. */
  async [Symbol.asyncDispose](): Promise<void> {
    const entries = [...this.#entries.values()]
    this.#entries.clear()
    for (const { handle } of entries) await (await handle).close()
  }
}
