import type { Duplex } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { NbdClient } from '../../core/nbd/index.ts'
import { RecordKind, adaptiveZstd } from '../../core/record/index.ts'
import { STREAM_PROTOCOL } from '../../core/stream/index.ts'
import type { Welcome } from '../../core/stream/index.ts'
import { FrameQueue, SlabPool } from '../buffer/index.ts'
import { StreamLink } from '../replicate/index.ts'
import { RaceGuard, SyncRun } from '../sync/index.ts'
import { AckMeter } from './ack-meter.ts'
import { MAX_WRITE_BYTES } from './connection.ts'
import type { CapturedDisk } from './connection.ts'
import { CutHold } from './cut-hold.ts'
import { CutLog } from './group-clock.ts'
import type { GroupClock } from './group-clock.ts'
import type { CaptureEvent, CaptureRequests, CaptureWorkerData } from './messages.ts'
import { Recorder } from './recorder.ts'
import { CaptureTarget } from './target.ts'

/** One turn of the event loop. */
const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
const SMALL_SLAB_BYTES = 256 * 1024
/** A sync leaves half of the memory to the guest's own writes. */
const SYNC_SHARE = 0.5
const READS_IN_FLIGHT = 8
/** With fewer acknowledgements in a second one hiccup would be the p99. */
const MIN_ACKS_FOR_P99 = 200

export type CaptureSessionOptions = Omit<CaptureWorkerData, 'agent' | 'heartbeat' | 'groupClock'> & {
  clock: GroupClock
  connect: (signal: AbortSignal) => Promise<Duplex>
  emit: (event: CaptureEvent) => void
  nowUnixMs: () => number
  random: () => number
}

type Answer<Name extends keyof CaptureRequests> = Promise<CaptureRequests[Name]['answer']>
type Ask<Name extends keyof CaptureRequests> = CaptureRequests[Name]['ask']

/**
 * Capture of one VM, all its disks: NBD target, records, memory, stream, syncs, markers. Lives in a worker thread of its own, or,
 * for a bench, wherever it is put. The main thread asks (messages.ts), events tell it what happened.
 */
export class CaptureSession implements AsyncDisposable {
  readonly #options: CaptureSessionOptions
  readonly #disks: CapturedDisk[]
  readonly #queue = new FrameQueue()
  readonly #meter = new AckMeter()
  readonly #guard = new RaceGuard()
  readonly #cutLog = new CutLog()
  readonly #largeSlabs: SlabPool
  readonly #recorder: Recorder
  readonly #target: CaptureTarget
  readonly #link: StreamLink
  #attached = false
  #consistentFromSeq = Infinity
  readonly #connections = new Map<string, number>()
  readonly #hold = new CutHold(() => this.#target.releaseHeld())
  #sync: AbortController | undefined
  #waiters: { until: () => boolean; resolve: () => void }[] = []

  constructor(options: CaptureSessionOptions) {
    this.#options = options
    this.#disks = options.disks.map(({ disk, key, sizeBytes }) => ({ disk, key, sizeBytes, capturedBytes: 0 }))
    this.#largeSlabs = new SlabPool(MAX_WRITE_BYTES, options.budgetBytes / 4)
    this.#recorder = new Recorder({
      queue: this.#queue,
      smallSlabs: new SlabPool(SMALL_SLAB_BYTES, options.budgetBytes / 4),
      largeSlabs: this.#largeSlabs,
      compressor: adaptiveZstd(),
      nowUnixMs: options.nowUnixMs,
      lingerMs: options.lingerMs,
    })
    this.#queue.onPush = () => this.#onFrame()
    const { vm, vpg, vms, disks, emit } = options
    this.#link = new StreamLink({
      queue: this.#queue, connect: options.connect, random: options.random,
      hello: (epoch, reason) => ({ protocol: STREAM_PROTOCOL, vm, vpg, vms, epoch, disks, reason }),
      onUp: () => emit({ is: 'link', up: true, why: '' }),
      onDown: (why) => {
        emit({ is: 'link', up: false, why })
        this.#wake()
      },
      onOver: (why) => this.#letGo(why),
      onDurable: () => this.#wake(),
      onNews: (news) => emit({ is: 'news', news }),
    })
    this.#target = new CaptureTarget({
      path: options.targetPath,
      disks: this.#disks,
      host: {
        recorder: this.#recorder,
        slabs: this.#largeSlabs,
        meter: this.#meter,
        stampBatch: () => this.#cutLog.stamp(options.clock.read(), this.#recorder.lastSeq),
        holding: () => this.#hold.isOn,
        cutFromReads: (disk, offsetBytes, lengthBytes) => {
          if (this.#guard.busy) this.#guard.cut(disk, offsetBytes, lengthBytes)
        },
      },
      events: {
        opened: (key) => {
          this.#connections.set(key, (this.#connections.get(key) ?? 0) + 1)
          options.emit({ is: 'target', key, state: 'opened', clean: false, why: '' })
        },
        closed: (key, clean, why) => {
          this.#connections.set(key, (this.#connections.get(key) ?? 1) - 1)
          // What the guest wrote from here on is not captured, although it is acknowledged: no marker may follow.
          if (this.#connections.get(key) === 0) this.#hold.end()
          options.emit({ is: 'target', key, state: 'closed', clean, why })
        },
      },
    })
  }

  async start(): Promise<void> {
    await this.#target.listen()
  }

  async open({ reason, epoch }: Ask<'open'>): Answer<'open'> {
    this.#stopSync('a new attach begins')
    this.#target.letGo()
    const { promise: welcomed, resolve } = Promise.withResolvers<Welcome>()
    const agentLostData = await this.#link.open(reason, (welcome) => {
      this.#recorder.begin(welcome.epoch, welcome.durableSeq, !welcome.baseComplete)
      this.#consistentFromSeq = Infinity
      this.#cutLog.reset(this.#options.clock.read(), welcome.durableSeq)
      this.#recorder.mark(RecordKind.epoch, 0, { ...epoch, disks: this.#options.disks })
      this.#attached = true
      resolve(welcome)
    })
    return { ...(await welcomed), agentLostData }
  }

  async sync({ kind, reason, exportSocketPath, disks, rateBytesPerSec }: Ask<'sync'>): Answer<'sync'> {
    this.#mustBeAttached()
    this.#stopSync('another sync begins')
    const abort = new AbortController()
    this.#sync = abort
    const totalBytes = disks.reduce((sum, disk) => sum + disk.totalBytes, 0)
    let doneBytes = 0
    const admit = this.#admission(rateBytesPerSec)
    this.#recorder.mark(RecordKind.syncBegin, 0, { kind, reason })
    for (const disk of disks) {
      await using client = await NbdClient.connect({ path: exportSocketPath }, {
        exportName: disk.exportName,
        metaContexts: ['base:allocation', ...(disk.bitmapContext === undefined ? [] : [disk.bitmapContext])],
        signal: abort.signal,
      })
      const before = doneBytes
      let copiedBytes = 0
      await new SyncRun({
        disk, client, sink: this.#recorder, guard: this.#guard, slabs: this.#largeSlabs, admit, readsInFlight: READS_IN_FLIGHT, signal: abort.signal,
        onProgress: (bytes, scannedToBytes) => {
          copiedBytes += bytes
          doneBytes = before + (disk.bitmapContext === undefined ? scannedToBytes : copiedBytes)
          this.#options.emit({ is: 'sync', doneBytes, totalBytes })
        },
      }).run()
      doneBytes = before + disk.totalBytes
    }
    abort.signal.throwIfAborted()
    this.#recorder.mark(RecordKind.syncEnd, 0, { kind })
    this.#recorder.endDirect()
    this.#recorder.flush()
    this.#consistentFromSeq = this.#recorder.lastSeq
    this.#cutLog.stamp(this.#options.clock.read(), this.#recorder.lastSeq)
    this.#sync = undefined
    return { lastSeq: this.#recorder.lastSeq }
  }

  async cut({ c, mark }: Ask<'cut'>): Answer<'cut'> {
    // Whatever QEMU has closed before this cut was asked for is seen first: what the guest writes since then is not captured.
    await turn()
    await turn()
    return this.#mark(this.#cutLog.namedSeq(c), mark)
  }

  async hold({ cutId, holdMs }: Ask<'hold'>): Answer<'hold'> {
    if (!this.#isConsistent()) return { refused: 'capture is not in step' }
    const namedSeq = this.#recorder.lastSeq
    return this.#hold.begin(cutId, namedSeq, holdMs) ? { namedSeq } : { refused: 'another cut is under way' }
  }

  async commit({ cutId, mark }: Ask<'commit'>): Answer<'commit'> {
    const namedSeq = this.#hold.namedSeq(cutId)
    if (namedSeq === undefined) return { refused: 'the hold ran out' }
    const answer = this.#mark(namedSeq, mark)
    this.#hold.end()
    return answer
  }

  async release({ cutId }: Ask<'release'>): Answer<'release'> {
    if (this.#hold.namedSeq(cutId) !== undefined) this.#hold.end()
    return {}
  }

  async proof({ mark, upToSeq }: Ask<'proof'>): Answer<'proof'> {
    if (this.#attached) this.#recorder.mark(RecordKind.proof, upToSeq ?? this.#recorder.lastSeq, mark)
    return {}
  }

  async captured(): Answer<'captured'> {
    return { seq: this.#recorder.lastSeq, bytes: Object.fromEntries(this.#disks.map(({ key, capturedBytes }) => [key, capturedBytes])) }
  }

  async restartCopy(): Answer<'restartCopy'> {
    this.#mustBeAttached()
    for (const { disk } of this.#disks) this.#recorder.range(RecordKind.syncProgress, disk, 0, 0)
    this.#recorder.flush()
    return { lastSeq: this.#recorder.lastSeq }
  }

  async letGo({ why }: Ask<'letGo'>): Answer<'letGo'> {
    this.#letGo(why)
    return {}
  }

  async end({ deadlineMs }: Ask<'end'>): Answer<'end'> {
    this.#stopSync('capture ends')
    this.#attached = false
    this.#recorder.flush()
    const { lastSeq } = this.#recorder
    const { promise: late, reject } = Promise.withResolvers<never>()
    const timer = setTimeout(() => reject(new CdpError('TIMEOUT', 'not everything became durable in time', { context: { lastSeq, durableSeq: this.#link.durableSeq } })), deadlineMs)
    try {
      if (this.#link.up) await Promise.race([this.#until(() => this.#link.durableSeq >= lastSeq || !this.#link.up), late])
    } finally {
      clearTimeout(timer)
      this.#link.end()
    }
    return { durableSeq: this.#link.durableSeq }
  }

  /** Called about once a second: figures for the main thread, and the rule that a slow capture lets go. */
  tick(loopLateMs: number): void {
    const ack = this.#meter.take()
    const { slowAck } = this.#options
    this.#options.emit({
      is: 'stats',
      stats: {
        receivedSeq: this.#recorder.lastSeq, durableSeq: this.#link.durableSeq, heldBytes: this.#queue.heldBytes + this.#recorder.unsealedBytes,
        peakBytes: this.#queue.peakBytes, linkUp: this.#link.up, ack, loopLateMs,
      },
    })
    const worstMs = Math.max(ack.maxUs / 1000, ack.held.maxUs / 1000, ack.count > 0 ? loopLateMs : 0)
    const p99Counts = ack.count >= MIN_ACKS_FOR_P99
    if (this.#attached && ((p99Counts && ack.p99Us / 1000 > slowAck.p99Ms) || worstMs > slowAck.maxMs)) {
      this.#letGo(`capture slow: acknowledgements took p99 ${Math.round(ack.p99Us / 1000)} ms, at worst ${Math.round(worstMs)} ms`)
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#attached = false
    this.#hold.end()
    this.#stopSync('capture stops')
    await this.#target[Symbol.asyncDispose]()
    await this.#link[Symbol.asyncDispose]()
    this.#recorder.dispose()
  }

  /** @throws CdpError ABORTED: capture was let go in the meantime, and what a copy would miss is not captured */
  #mustBeAttached(): void {
    if (!this.#attached) throw new CdpError('ABORTED', 'capture was let go before the copy began', { retry: true })
  }

  #isConsistent(): boolean {
    return this.#attached && this.#consistentFromSeq !== Infinity && this.#disks.every(({ key }) => (this.#connections.get(key) ?? 0) > 0)
  }

  #mark(namedSeq: number | undefined, mark: Ask<'cut'>['mark']): CaptureRequests['cut']['answer'] {
    if (!this.#isConsistent()) return { refused: this.#attached ? 'capture is not in step' : 'capture is not attached' }
    if (namedSeq === undefined || namedSeq < this.#consistentFromSeq) return { refused: 'the cut lies before the end of the sync' }
    this.#recorder.mark(RecordKind.checkpoint, namedSeq, mark)
    this.#recorder.flush()
    return { namedSeq }
  }

  #onFrame(): void {
    this.#link.pump()
    if (this.#attached && this.#queue.heldBytes + this.#recorder.unsealedBytes > this.#options.budgetBytes) {
      this.#letGo(this.#link.up ? 'the link is slower than the guest writes and the memory is full' : 'the link is down and the memory is full')
    }
  }

  #letGo(why: string): void {
    if (!this.#attached) return
    this.#attached = false
    this.#consistentFromSeq = Infinity
    this.#hold.end()
    this.#stopSync(why)
    this.#target.letGo()
    this.#options.emit({ is: 'letGo', why })
  }

  #stopSync(why: string): void {
    this.#sync?.abort(new CdpError('ABORTED', `sync stopped: ${why}`))
    this.#sync = undefined
    this.#guard.clear()
    this.#wake()
  }

  /** Lets a sync read on only while memory has room, and not faster than the limit (0: none). */
  #admission(rateBytesPerSec: number): (lengthBytes: number, signal: AbortSignal) => Promise<void> {
    let nextMs = performance.now()
    const room = (): boolean => this.#queue.heldBytes + this.#recorder.unsealedBytes < this.#options.budgetBytes * SYNC_SHARE
    return async (lengthBytes, signal) => {
      if (!room()) await this.#until(() => room() || signal.aborted)
      if (rateBytesPerSec > 0) {
        const waitMs = nextMs - performance.now()
        nextMs = Math.max(nextMs, performance.now()) + (lengthBytes / rateBytesPerSec) * 1000
        if (waitMs > 0) await sleep(waitMs, undefined, { signal }).catch(() => undefined)
      }
      signal.throwIfAborted()
    }
  }

  async #until(until: () => boolean): Promise<void> {
    if (until()) return
    await new Promise<void>((resolve) => this.#waiters.push({ until, resolve }))
  }

  #wake(): void {
    if (this.#waiters.length === 0) return
    this.#waiters = this.#waiters.filter(({ until, resolve }) => {
      if (!until()) return true
      resolve()
      return false
    })
  }
}

/** What a thrown thing looks like on its way to the main thread. */
export const errorForMain = (error: unknown): { code: string; message: string; hint?: string } => {
  const cdp = error instanceof CdpError ? error : new CdpError('INTERNAL', errorMessage(error))
  return { code: cdp.code, message: cdp.message, ...(cdp.hint === undefined ? {} : { hint: cdp.hint }) }
}
