import { fork, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { CdpError } from '../../core/errors/index.ts'
import type { CaptureStats, CaptureWorker } from '../../plugin/capture/index.ts'
import type { CheckpointSamples, FromPlugin, PluginRequest, StartCapture } from './plugin-messages.ts'
import { BASE_EXPORT, DIRTY_EXPORT } from './source-disk.ts'
import type { Dirty } from './source-disk.ts'

/** What capture of a VM told by itself. */
export type CaptureNews = { letGo: string[]; peakBytes: number; /** By the last sync, so far. */ sentBytes: number; stats: CaptureStats | undefined }

export type CaptureOptions = Omit<StartCapture, 'vpg'>

/** The bench's handle of its plugin process (plugin-process.ts). */
export class PluginSide implements AsyncDisposable {
  readonly #child: ChildProcess
  readonly #waiting = new Map<number, { resolve: (value: unknown) => void; reject: (error: CdpError) => void }>()
  readonly #news = new Map<string, CaptureNews>()
  #nextId = 1

  private constructor(child: ChildProcess) {
    this.#child = child
    child.on('message', (message: FromPlugin) => this.#take(message))
    child.on('exit', () => {
      for (const { reject } of this.#waiting.values()) reject(new CdpError('CLOSED', 'the plugin process ended'))
      this.#waiting.clear()
    })
  }

  static async start(nodeArgs: readonly string[] = []): Promise<PluginSide> {
    const child = fork(new URL('./plugin-process.js', import.meta.url), [], { serialization: 'advanced', execArgv: [...nodeArgs], stdio: ['ignore', 'inherit', 'inherit', 'ipc'] })
    const side = new PluginSide(child)
    await once(child, 'message')
    return side
  }

  get pid(): number {
    return this.#child.pid ?? 0
  }

  news(vm: string): CaptureNews {
    const news = this.#news.get(vm)
    if (news === undefined) throw new CdpError('NOT_FOUND', `VM ${vm} is not captured`)
    return news
  }

  /** A capture worker for a disk, listening, with its stream open. `copy`: the initial sync is left to the caller; else the disk counts as blank. */
  async capture(options: CaptureOptions, { copy = false } = {}): Promise<void> {
    const { vm } = options
    this.#news.set(vm, { letGo: [], peakBytes: 0, sentBytes: 0, stats: undefined })
    await this.#request({ do: 'start', with: { ...options, vpg: vpgOf(vm) } })
    await this.ask(vm, 'open', { reason: 'bench', epoch: { reason: 'bench' } })
    if (!copy) await this.ask(vm, 'sync', { kind: 'initial', reason: 'bench: a blank disk', exportSocketPath: '', disks: [], rateBytesPerSec: 0 })
  }

  /** The initial sync of a disk; resolves when its end is recorded. */
  copy(vm: string, exportSocketPath: string, sizeBytes: number): Promise<{ lastSeq: number }> {
    const disk = { disk: 0, sizeBytes, fromBytes: 0, wholeAbove: true, exportName: BASE_EXPORT, totalBytes: sizeBytes }
    return this.ask(vm, 'sync', { kind: 'initial', reason: 'bench', exportSocketPath, disks: [disk], rateBytesPerSec: 0 })
  }

  /** A delta sync of a disk; resolves when its end is recorded. */
  compare(vm: string, exportSocketPath: string, sizeBytes: number): Promise<{ lastSeq: number }> {
    const disk = { disk: 0, sizeBytes, fromBytes: 0, wholeAbove: true, byHash: true, exportName: BASE_EXPORT, totalBytes: sizeBytes }
    return this.ask(vm, 'sync', { kind: 'delta', reason: 'bench', exportSocketPath, disks: [disk], rateBytesPerSec: 0 })
  }

  /** A bitmap sync of a disk; resolves when its end is recorded. */
  copyDirty(vm: string, exportSocketPath: string, sizeBytes: number, { dirtyBytes, bitmapContext }: Dirty): Promise<{ lastSeq: number }> {
    const disk = { disk: 0, sizeBytes, fromBytes: 0, wholeAbove: false, bitmapContext, exportName: DIRTY_EXPORT, totalBytes: dirtyBytes }
    return this.ask(vm, 'sync', { kind: 'bitmap', reason: 'bench', exportSocketPath, disks: [disk], rateBytesPerSec: 0 })
  }

  async ask<Name extends Parameters<CaptureWorker['ask']>[0]>(
    vm: string, name: Name, ask: Parameters<typeof CaptureWorker.prototype.ask<Name>>[1],
  ): Promise<Awaited<ReturnType<typeof CaptureWorker.prototype.ask<Name>>>> {
    return (await this.#request({ do: 'ask', vm, name, ask })) as Awaited<ReturnType<typeof CaptureWorker.prototype.ask<Name>>>
  }

  /** Ends capture of a VM: cleanly, when everything is durable, unless it let go. */
  async release(vm: string): Promise<void> {
    if (this.news(vm).letGo.length === 0) await this.ask(vm, 'end', { deadlineMs: 60_000 })
    await this.#request({ do: 'stop', vm })
  }

  /** The id of a new checkpoint, once it is valid. */
  async checkpoint(vm: string): Promise<string> {
    return (await this.#request({ do: 'checkpoint', vm })) as string
  }

  async beginCheckpoints(vm: string, everyMs: number, sampleEveryMs: number): Promise<void> {
    await this.#request({ do: 'beginCheckpoints', vm, everyMs, sampleEveryMs })
  }

  async endCheckpoints(): Promise<CheckpointSamples> {
    return (await this.#request({ do: 'endCheckpoints' })) as CheckpointSamples
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return
    const ended = once(this.#child, 'exit')
    this.#child.disconnect()
    const timer = setTimeout(() => this.#child.kill('SIGKILL'), 5_000)
    await ended
    clearTimeout(timer)
  }

  #request(request: PluginRequest): Promise<unknown> {
    const id = this.#nextId++
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject })
      this.#child.send({ ...request, id }, (error) => {
        if (error !== null) reject(new CdpError('CLOSED', 'the plugin process is gone', { cause: error }))
      })
    })
  }

  #take(message: FromPlugin): void {
    if ('ready' in message) return
    if ('event' in message) return this.#note(message)
    const waiting = this.#waiting.get(message.id)
    this.#waiting.delete(message.id)
    if ('error' in message) waiting?.reject(new CdpError('INTERNAL', message.error))
    else waiting?.resolve(message.answer)
  }

  #note({ vm, event }: Extract<FromPlugin, { vm: string }>): void {
    const news = this.#news.get(vm)
    if (news === undefined) return
    if (event.is === 'letGo') news.letGo.push(event.why)
    if (event.is === 'sync') news.sentBytes = event.sentBytes
    if (event.is === 'stats') {
      news.stats = event.stats
      news.peakBytes = Math.max(news.peakBytes, event.stats.peakBytes, event.stats.heldBytes)
    }
  }
}

/** The group of one VM. */
export const vpgOf = (vm: string): string => `bench${vm}`
