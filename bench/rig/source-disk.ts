import { spawn, type ChildProcess } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { once } from 'node:events'
import { closeSync, openSync, ftruncateSync, rmSync, writeSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { checkHandshake } from '../../core/nbd/index.ts'
import { withQmp } from '../../core/qmp/index.ts'
import { memoryImagePath } from './disk-directory.ts'

/** Where a mirror job writes to. */
export type MirrorTarget = { socketPath: string; exportName: string } | { host: string; port: number; exportName: string; tlsDirectory: string }

/** The read-only export that a sync reads from. */
export const BASE_EXPORT = 'base'
/** The same with what a dirty bitmap holds, as capture has QEMU serve it for a bitmap sync. */
export const DIRTY_EXPORT = 'dirty'
const BITMAP = 'dirty0'
/** What capture takes for its bitmaps. */
const BITMAP_GRANULARITY_BYTES = 64 * 1024

export type Dirty = { dirtyBytes: number; bitmapContext: string }
const FILL_BYTES = 16 * 1024 * 1024

/**
 * A disk as QEMU has it below a guest, served writable to fio by qemu-storage-daemon: the same block layer and the same mirror job, without
 * the emulated CPU of a guest. The image lies on tmpfs, so that the disk itself is not what is measured.
 */
export class SourceDisk implements AsyncDisposable {
  readonly uri: string
  readonly sizeBytes: number
  readonly nbdPath: string
  readonly #child: ChildProcess
  readonly #imagePath: string
  readonly #qmpPath: string

  private constructor(child: ChildProcess, imagePath: string, qmpPath: string, nbdPath: string, sizeBytes: number) {
    this.#child = child
    this.#imagePath = imagePath
    this.#qmpPath = qmpPath
    this.nbdPath = nbdPath
    this.uri = `nbd+unix:///disk0?socket=${nbdPath}`
    this.sizeBytes = sizeBytes
  }

  /** `filled`: every block holds data that do not compress. */
  static async start(directory: string, name: string, sizeBytes: number, { filled = false } = {}): Promise<SourceDisk> {
    const imagePath = memoryImagePath(name)
    const image = openSync(imagePath, 'w')
    ftruncateSync(image, sizeBytes)
    if (filled) {
      const data = randomBytes(FILL_BYTES)
      for (let at = 0; at < sizeBytes; at += FILL_BYTES) writeSync(image, data, 0, Math.min(FILL_BYTES, sizeBytes - at), at)
    }
    closeSync(image)
    const nbdPath = `${directory}/${name}.nbd`
    const qmpPath = `${directory}/${name}.qmp`
    const child = spawn('setpriv', [
      '--pdeathsig', 'KILL', '--', 'qemu-storage-daemon',
      '--chardev', `socket,id=qmp,path=${qmpPath},server=on,wait=off`, '--monitor', 'chardev=qmp', '--object', 'iothread,id=io0',
      '--blockdev', `driver=file,node-name=file0,filename=${imagePath},aio=threads`, '--blockdev', 'driver=raw,node-name=disk0,file=file0',
      '--nbd-server', `addr.type=unix,addr.path=${nbdPath}`, '--export', 'type=nbd,id=export0,node-name=disk0,name=disk0,writable=on,iothread=io0',
      '--export', `type=nbd,id=export1,node-name=disk0,name=${BASE_EXPORT},writable=off,iothread=io0`,
    ], { stdio: ['ignore', 'ignore', 'inherit'] })
    const source = new SourceDisk(child, imagePath, qmpPath, nbdPath, sizeBytes)
    for (let attempt = 0; ; attempt++) {
      try {
        await checkHandshake({ path: nbdPath }, BASE_EXPORT, 1000)
        return source
      } catch (error) {
        if (attempt > 100) {
          await source[Symbol.asyncDispose]()
          throw error
        }
        await delay(50)
      }
    }
  }

  /** Runs `work` while everything written to the disk is mirrored, by the job that capture uses. */
  async mirrored<T>(target: MirrorTarget, work: () => Promise<T>): Promise<T> {
    await withQmp(this.#qmpPath, {}, async (qmp) => {
      if ('tlsDirectory' in target) {
        await qmp.execute('object-add', { 'qom-type': 'tls-creds-x509', id: 'tls0', endpoint: 'client', dir: target.tlsDirectory, 'verify-peer': true })
      }
      await qmp.execute('blockdev-add', {
        driver: 'nbd', 'node-name': 'target0', export: target.exportName,
        server: 'socketPath' in target ? { type: 'unix', path: target.socketPath } : { type: 'inet', host: target.host, port: String(target.port) },
        ...('tlsDirectory' in target ? { 'tls-creds': 'tls0' } : {}),
      })
      await qmp.execute('blockdev-mirror', { 'job-id': 'mirror0', device: 'disk0', target: 'target0', sync: 'none', 'copy-mode': 'write-blocking', granularity: 4096, 'on-target-error': 'report' })
      await qmp.waitForEvent(({ event }) => event === 'BLOCK_JOB_READY', { deadlineMs: 10_000 })
    })
    try {
      return await work()
    } finally {
      await withQmp(this.#qmpPath, {}, async (qmp) => {
        const jobs = (await qmp.execute('query-block-jobs')) as unknown[]
        if (jobs.length > 0) {
          await qmp.execute('block-job-cancel', { device: 'mirror0', force: true })
          await qmp.waitForEvent(({ event }) => event === 'BLOCK_JOB_COMPLETED' || event === 'BLOCK_JOB_CANCELLED', { deadlineMs: 10_000 })
        }
        for (let attempt = 0; ; attempt++) {
          try {
            await qmp.execute('blockdev-del', { 'node-name': 'target0' })
            break
          } catch (error) {
            if (attempt > 50) throw error
            await delay(50)
          }
        }
        if ('tlsDirectory' in target) await qmp.execute('object-del', { id: 'tls0' })
      })
    }
  }

  /** Has a bitmap record what `write` writes, and calls `use` while DIRTY_EXPORT offers it. */
  async dirtied<T>(write: () => Promise<unknown>, use: (dirty: Dirty) => Promise<T>): Promise<T> {
    const bitmap = { node: 'disk0', name: BITMAP }
    await withQmp(this.#qmpPath, {}, (qmp) => qmp.execute('block-dirty-bitmap-add', { ...bitmap, granularity: BITMAP_GRANULARITY_BYTES }))
    await write()
    const dirtyBytes = await withQmp(this.#qmpPath, {}, async (qmp) => {
      await qmp.execute('block-dirty-bitmap-disable', bitmap)
      await qmp.execute('block-export-add', { type: 'nbd', id: 'export2', 'node-name': 'disk0', name: DIRTY_EXPORT, writable: false, iothread: 'io0', bitmaps: [bitmap] })
      const nodes = (await qmp.execute('query-named-block-nodes', { flat: true })) as { 'node-name': string; 'dirty-bitmaps'?: { name: string; count: number }[] }[]
      return nodes.find((node) => node['node-name'] === 'disk0')?.['dirty-bitmaps']?.find(({ name }) => name === BITMAP)?.count ?? 0
    })
    try {
      return await use({ dirtyBytes, bitmapContext: `qemu:dirty-bitmap:${BITMAP}` })
    } finally {
      await withQmp(this.#qmpPath, {}, async (qmp) => {
        await qmp.execute('block-export-del', { id: 'export2', mode: 'hard' })
        await qmp.waitForEvent(({ event }) => event === 'BLOCK_EXPORT_DELETED', { deadlineMs: 10_000 })
        await qmp.execute('block-dirty-bitmap-remove', bitmap)
      })
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#child.exitCode === null && this.#child.signalCode === null) {
      const ended = once(this.#child, 'exit')
      this.#child.kill('SIGKILL')
      await ended
    }
    rmSync(this.#imagePath, { force: true })
  }
}
