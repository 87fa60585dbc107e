import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { CdpError, errorCode } from '../../core/errors/index.ts'
import { NbdClient } from '../../core/nbd/index.ts'
import { collectData, mapData } from './data-map.ts'
import type { DataMap } from './data-map.ts'
import type { ReadableMirror } from './mirror-disk.ts'
import { readMirrorRecord } from './mirror-record.ts'
import { mirrorFileName } from './mirror-storage.ts'
import { NBD_SOCKET, withSocketPath } from './socket-path.ts'

/** Reads files by path: agent/index has it. */
export type FileReader = { read(path: string, buffer: Buffer, offsetBytes: number): Promise<number> }

const READ_DEADLINE_MS = 20_000
/** What stat counts in. */
const BLOCK_BYTES = 512
const AGAIN_MS = 100

/** The mirror of a disk for reading, from any thread or process. Files are opened by `files`, which may share them. @throws CdpError FORMAT */
export const openReadableMirror = async (vmDirectory: string, disk: number, files: FileReader): Promise<ReadableMirror> => {
  const directory = join(vmDirectory, 'mirror')
  const record = await readMirrorRecord(directory, disk)
  return record === undefined ? new ReadableFile(join(directory, mirrorFileName(disk)), files) : new ReadableNbd(directory, disk)
}

class ReadableFile implements ReadableMirror {
  readonly #path: string
  readonly #files: FileReader

  constructor(path: string, files: FileReader) {
    this.#path = path
    this.#files = files
  }

  async read(offsetBytes: number, target: Buffer): Promise<void> {
    const bytes = await this.#files.read(this.#path, target, offsetBytes)
    if (bytes < target.length) target.fill(0, bytes)
  }

  dataMap(signal?: AbortSignal): Promise<DataMap> {
    return mapData(this.#path, signal)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.resolve()
  }
}

/** What the storage daemon serves. Reading changes nothing, so it connects again when the daemon was started anew. */
class ReadableNbd implements ReadableMirror {
  readonly #directory: string
  readonly #disk: number
  #client: Promise<NbdClient> | undefined
  #closed = false

  constructor(directory: string, disk: number) {
    this.#directory = directory
    this.#disk = disk
  }

  read(offsetBytes: number, target: Buffer): Promise<void> {
    return this.#ask(AbortSignal.timeout(READ_DEADLINE_MS), async (client, signal) => {
      const lengthBytes = Math.max(0, Math.min(target.length, client.sizeBytes - offsetBytes))
      target.fill(0, lengthBytes)
      if (lengthBytes > 0) await client.readInto(target, 0, offsetBytes, lengthBytes, signal)
    })
  }

  async dataMap(signal?: AbortSignal): Promise<DataMap> {
    const late = AbortSignal.timeout(READ_DEADLINE_MS)
    try {
      return await this.#ask(signal === undefined ? late : AbortSignal.any([late, signal]), collectData)
    } catch {
      // Not knowing where the holes are costs time, not truth.
      return undefined
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closed = true
    const client = await this.#client?.catch(() => undefined)
    await client?.[Symbol.asyncDispose]()
  }

  async #ask<T>(signal: AbortSignal, work: (client: NbdClient, signal: AbortSignal) => Promise<T>): Promise<T> {
    for (;;) {
      const connecting = (this.#client ??= this.#connect())
      let isConnected = false
      try {
        const client = await connecting
        isConnected = true
        return await work(client, signal)
      } catch (error) {
        const code = errorCode(error)
        if (isConnected && code !== 'CLOSED') {
          if (!signal.aborted) throw error
        } else if (this.#client === connecting) this.#client = undefined
        if (this.#closed) throw new CdpError('CLOSED', 'this mirror was closed')
        if (signal.aborted) {
          throw new CdpError('TIMEOUT', `the storage of the mirror of disk ${this.#disk} does not answer`, { cause: error, retry: true, hint: 'Look at the storage below the mirror, and at the log of the agent.', context: { disk: this.#disk } })
        }
        await delay(AGAIN_MS)
      }
    }
  }

  #connect(): Promise<NbdClient> {
    return withSocketPath(this.#directory, NBD_SOCKET, (path) => NbdClient.connect({ path }, { exportName: String(this.#disk), metaContexts: ['base:allocation'], deadlineMs: READ_DEADLINE_MS }))
  }
}

/** Some mirror of the VM is not all holes. */
export const mirrorHasData = async (vmDirectory: string, disks: readonly { disk: number }[]): Promise<boolean> => {
  const directory = join(vmDirectory, 'mirror')
  for (const { disk } of disks) {
    const record = await readMirrorRecord(directory, disk)
    if (record === undefined) {
      if ((await stat(join(directory, mirrorFileName(disk))).catch(() => undefined))?.blocks) return true
      continue
    }
    // A device may hold anything, and does not say where.
    if (record.kind === 'device') return true
    await using mirror = new ReadableNbd(directory, disk)
    const map = await mirror.dataMap()
    if (map === undefined || map.length > 0) return true
  }
  return false
}

/** Bytes of storage that the mirror of a disk takes: of a device, all of it. */
export const mirrorBytes = async (vmDirectory: string, disk: number): Promise<number> => {
  const directory = join(vmDirectory, 'mirror')
  const record = await readMirrorRecord(directory, disk)
  if (record?.kind === 'device') return record.sizeBytes
  return ((await stat(record?.path ?? join(directory, mirrorFileName(disk))).catch(() => undefined))?.blocks ?? 0) * BLOCK_BYTES
}
