import { open } from 'node:fs/promises'
import type { FileHandle } from 'node:fs/promises'
import { CdpError } from '../../core/errors/index.ts'

type Pooled = { opening: Promise<FileHandle>; users: number; evicted: boolean }

/**
 * Files open for reading, shared by path: at most `maxOpen` stay open when nobody reads, the least recently used are closed.
 * A file that was removed meanwhile is readable as long as it happens to be open.
 */
export class FilePool {
  readonly #maxOpen: number
  readonly #files = new Map<string, Pooled>()
  #closed = false

  constructor(maxOpen = 128) {
    this.#maxOpen = maxOpen
  }

  get openCount(): number {
    return this.#files.size
  }

  /**
   * Reads up to `buffer.length` bytes at `offsetBytes`; less only at the end of the file.
   * @returns bytes read
   * @throws Node's error (ENOENT if the file is gone), CdpError CLOSED after dispose
   */
  async read(path: string, buffer: Buffer, offsetBytes: number): Promise<number> {
    const pooled = this.#take(path)
    try {
      const file = await pooled.opening
      let done = 0
      while (done < buffer.length) {
        const { bytesRead } = await file.read(buffer, done, buffer.length - done, offsetBytes + done)
        if (bytesRead === 0) break
        done += bytesRead
      }
      return done
    } finally {
      pooled.users--
      if (pooled.evicted && pooled.users === 0) await this.#close(pooled)
    }
  }

  /** Closes a file that was replaced, so that the next read opens its successor. */
  async forget(path: string): Promise<void> {
    const pooled = this.#files.get(path)
    if (pooled !== undefined) await this.#evict(path, pooled)
  }

  /** Closes everything below a directory that is gone: another one may come under its name. */
  async forgetUnder(directory: string): Promise<void> {
    for (const [path, pooled] of [...this.#files]) if (path.startsWith(`${directory}/`)) await this.#evict(path, pooled)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    for (const [path, pooled] of [...this.#files]) await this.#evict(path, pooled)
  }

  #take(path: string): Pooled {
    if (this.#closed) throw new CdpError('CLOSED', 'the files of this recovery point are closed')
    let pooled = this.#files.get(path)
    if (pooled === undefined) {
      pooled = { opening: open(path, 'r'), users: 0, evicted: false }
      const added = pooled
      // A failed open is not kept. Who waits for it gets the error.
      added.opening.catch(() => this.#files.get(path) === added && this.#files.delete(path))
    } else {
      this.#files.delete(path)
    }
    this.#files.set(path, pooled)
    pooled.users++
    if (this.#files.size > this.#maxOpen) this.#evictOldest()
    return pooled
  }

  #evictOldest(): void {
    for (const [path, pooled] of this.#files) {
      if (pooled.users > 0) continue
      this.#files.delete(path)
      pooled.evicted = true
      void this.#close(pooled)
      return
    }
  }

  async #evict(path: string, pooled: Pooled): Promise<void> {
    this.#files.delete(path)
    pooled.evicted = true
    if (pooled.users === 0) await this.#close(pooled)
  }

  async #close(pooled: Pooled): Promise<void> {
    const file = await pooled.opening.catch(() => undefined)
    // Closing a file that was only read cannot lose anything.
    await file?.close().catch(() => undefined)
  }
}
