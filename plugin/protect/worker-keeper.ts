import { setTimeout as pause } from 'node:timers/promises'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import { CaptureWorker } from '../capture/index.ts'
import type { CaptureEvent, CaptureStats, CaptureWorkerOptions, Disowned } from '../capture/index.ts'
import { HeartbeatWatch } from './heartbeat-watch.ts'

export type WorkerKeeperOptions = {
  worker: Omit<CaptureWorkerOptions, 'disks' | 'onEvent' | 'onExit'>
  log: Logger
  /** What is captured is not all the guest writes any more. */
  onLost: (why: string) => void
  onSync: (progress: Extract<CaptureEvent, { is: 'sync' }>) => void
  /** QEMU has said goodbye for every disk, without an error before; nothing is captured any more. */
  onGoodbye: (atUnixMs: number) => void
  /** The stream to the agent is there again. */
  onLinkUp: () => void
  /** The recovery site has the group in another generation. */
  onDisowned: (disowned: Disowned) => void
  onNews: (news: Extract<CaptureEvent, { is: 'news' }>['news']) => void
}

const END_DEADLINE_MS = 5_000
/** Between the goodbyes of the first disk and the last. Cuts are refused meanwhile. */
const GOODBYES_MS = 1_000
const CLOSED_CHECK_MS = 10

/** Keeps the capture worker of one VM: has one that captures the right disks, watches over it, and knows which disks QEMU is connected for. */
export class WorkerKeeper {
  readonly #options: WorkerKeeperOptions
  readonly #beat = new HeartbeatWatch()
  #worker: CaptureWorker | undefined
  #disks: readonly DiskEntry[] = []
  #open = new Map<string, number>()
  #stats: CaptureStats | undefined
  #lettingGo = 0
  #watchesTargets = false
  /** Disks that QEMU has said goodbye for. A QEMU that ends does it for one after the other. */
  readonly #goodbyes = new Set<string>()
  #goodbyeAtUnixMs = 0
  #goodbyeLimit: NodeJS.Timeout | undefined

  constructor(options: WorkerKeeperOptions) {
    this.#options = options
  }

  get worker(): CaptureWorker | undefined {
    return this.#worker
  }

  get disks(): readonly DiskEntry[] {
    return this.#disks
  }

  get stats(): CaptureStats | undefined {
    return this.#stats
  }

  get hangs(): boolean {
    return this.#beat.hangs
  }

  /** A job is in QEMU for every disk: the end of one of their connections is a loss. */
  get watchesTargets(): boolean {
    return this.#watchesTargets
  }

  set watchesTargets(watches: boolean) {
    this.#watchesTargets = watches
    clearTimeout(this.#goodbyeLimit)
    this.#goodbyeLimit = undefined
    this.#goodbyes.clear()
  }

  /** True while QEMU is connected for that disk. */
  isOpen(key: string): boolean {
    return (this.#open.get(key) ?? 0) > 0
  }

  /** Resolves when no connection of QEMU is open any more, at the latest at the deadline. */
  async allClosed(deadlineMs: number): Promise<void> {
    const endsAtMs = performance.now() + deadlineMs
    while (performance.now() < endsAtMs && this.#worker?.exited === false && this.#disks.some(({ key }) => this.isOpen(key))) await pause(CLOSED_CHECK_MS)
  }

  /** Figures from before speak of another stream. */
  forgetStats(): void {
    this.#stats = undefined
  }

  /**
   * The worker that captures these disks: the one there is, if they have at most grown. Their numbers come with the agent's welcome.
   * @throws CdpError UNREACHABLE, ABORTED: what the one before has captured is not all at the agent, which no bitmap brings back; it stays
   */
  async workerFor(entries: readonly DiskEntry[]): Promise<CaptureWorker> {
    const before = this.#disks
    const same = entries.length === before.length && entries.every(({ key, sizeBytes }, n) => before[n].key === key && before[n].sizeBytes <= sizeBytes)
    const old = this.#worker
    if (old !== undefined && !old.exited) {
      if (same) {
        this.#disks = entries
        return old
      }
      await old.ask('deliver', {})
    }
    this.#disks = entries
    this.#worker = undefined
    await old?.[Symbol.asyncDispose]()
    this.#open = new Map()
    const worker: CaptureWorker = await CaptureWorker.start({
      ...this.#options.worker, disks: [...entries],
      onEvent: (event) => this.#onEvent(event),
      onExit: (why) => {
        if (this.#worker === worker) this.#options.onLost(`the capture worker ended: ${why}`)
      },
    })
    this.#worker = worker
    this.#beat.begin(worker)
    return worker
  }

  /** `inPeace`: QEMU's connections are left for QEMU to end. No cut is made from here on. */
  async letGo(why: string, inPeace = false): Promise<void> {
    const worker = this.#worker
    if (worker === undefined || worker.exited) return
    this.#lettingGo++
    await worker.ask('letGo', { why, ...(inPeace ? { inPeace } : {}) }).catch((error: unknown) => this.#options.log.warn('the worker did not let go', { error: errorMessage(error) }))
    this.#lettingGo--
  }

  /** A worker that hangs would hang the guest: it is ended, QEMU lets go. (The watchdog process does the same to the whole plugin.) */
  checkBeat(): void {
    if (!this.#beat.check()) return
    this.#options.log.error('the capture worker hangs and is ended')
    void this.#worker?.kill('it did not answer for 1 s')
  }

  /** Waits a while until everything is durable, and ends the worker. */
  async end(): Promise<void> {
    if (this.#worker === undefined || this.#worker.exited) return
    await this.#worker.ask('end', { deadlineMs: END_DEADLINE_MS }).catch((error: unknown) => this.#options.log.warn('not all of the captured data reached the agent', { error: errorMessage(error) }))
    await this.#worker[Symbol.asyncDispose]()
  }

  #ended({ key, clean, why, atUnixMs }: Extract<CaptureEvent, { is: 'target' }>): void {
    const { onLost, onGoodbye } = this.#options
    const lost = (): void => onLost(`QEMU ended the connection of ${key} (${why})`)
    if (!clean) return lost()
    if (this.#goodbyes.size === 0) this.#goodbyeAtUnixMs = atUnixMs
    this.#goodbyes.add(key)
    if (this.#disks.every((disk) => this.#goodbyes.has(disk.key))) return onGoodbye(this.#goodbyeAtUnixMs)
    this.#goodbyeLimit ??= setTimeout(lost, GOODBYES_MS)
  }

  #onEvent(event: CaptureEvent): void {
    const { log, onLost, onSync, onNews } = this.#options
    switch (event.is) {
      case 'target': {
        const { key, state } = event
        this.#open.set(key, (this.#open.get(key) ?? 0) + (state === 'opened' ? 1 : -1))
        if (state === 'closed' && this.#watchesTargets && !this.isOpen(key)) this.#ended(event)
        return
      }
      case 'letGo':
        // What was asked for is no loss.
        return this.#lettingGo > 0 ? undefined : onLost(event.why)
      case 'link':
        log.info(event.up ? 'stream to the agent is up' : 'stream to the agent is down', { why: event.why })
        if (event.up) this.#options.onLinkUp()
        return
      case 'sync':
        return onSync(event)
      case 'disowned':
        return this.#options.onDisowned(event)
      case 'news':
        return onNews(event.news)
      case 'stats':
        this.#stats = event.stats
        return
    }
  }
}

/** @throws CdpError NOT_FOUND */
export const requireDisks = (vmId: number, entries: readonly DiskEntry[]): void => {
  if (entries.length === 0) throw new CdpError('NOT_FOUND', `VM ${vmId} has no disk that can be protected`, { hint: 'Give it a writable disk on scsi, virtio, sata or ide.' })
}
