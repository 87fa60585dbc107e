import type { Duplex } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { NbdClient } from '../../core/nbd/index.ts'
import { RecordKind } from '../../core/record/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import { FIRST_GENERATION, STREAM_PROTOCOL } from '../../core/stream/index.ts'
import type { Welcome } from '../../core/stream/index.ts'
import { SlabPool, SpillFile, SpillingQueue } from '../buffer/index.ts'
import { RateCell, RateLimit, StreamLink } from '../replicate/index.ts'
import { CopyPace, DurableProgress, RaceGuard, SyncRun, VerifyRound } from '../sync/index.ts'
import type { SyncOptions } from '../sync/index.ts'
import { AckMeter } from './ack-meter.ts'
import { MAX_WRITE_BYTES } from './connection.ts'
import type { CapturedDisk } from './connection.ts'
import { CutHold } from './cut-hold.ts'
import { SealingThread } from './frame-sealer.ts'
import { CutLog } from './group-clock.ts'
import type { GroupClock } from './group-clock.ts'
import type { CaptureEvent, CaptureRequests, CaptureWorkerData } from './messages.ts'
import { Recorder } from './recorder.ts'
import { RoundLedger } from './round-ledger.ts'
import { StreamHashes } from './stream-hashes.ts'
import { CaptureTarget } from './target.ts'

/** One turn of the event loop. */
const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
const SMALL_SLAB_BYTES = 256 * 1024
/** A sync leaves half of the memory to the guest's own writes. */
const SYNC_SHARE = 0.5
/** Of the memory: what is above overflows into the spill. */
const SPILL_SHARE = 0.5
const READS_IN_FLIGHT = 8
/** What a VM needed and does not need any more is given back to the others. */
const TRIM_EVERY_TICKS = 10
/** Beside checkpoints: what is read is not held back any more. */
const JOIN_READS_IN_FLIGHT = 2
/** A verify is in no hurry. */
const VERIFY_READS_IN_FLIGHT = 2
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
  readonly #spill: SpillFile | undefined
  readonly #queue: SpillingQueue
  readonly #meter = new AckMeter()
  readonly #guard = new RaceGuard()
  readonly #cutLog = new CutLog()
  readonly #smallSlabs: SlabPool
  readonly #largeSlabs: SlabPool
  #ticks = 0
  readonly #sealer: SealingThread
  readonly #recorder: Recorder
  readonly #target: CaptureTarget
  readonly #link: StreamLink
  #attached = false
  #consistentFromSeq = Infinity
  /** The `epoch` record of the present attach. */
  #attachSeq = 0
  /** A sync of this stream has ended once: the agent has a base, and this stream's records follow it. */
  #wasInStep = false
  readonly #connections = new Map<string, number>()
  readonly #hold = new CutHold(() => this.#target.releaseHeld())
  readonly #hashes: StreamHashes
  readonly #progress = new DurableProgress()
  #sync: AbortController | undefined
  /** The same, if it is a first copy beside checkpoints. */
  #join: AbortController | undefined
  #delivering: AbortController | undefined
  /** Of a verify, until its verdict. */
  #round: { abort: AbortController; verify: VerifyRound } | undefined
  readonly #ledger = new RoundLedger()
  #waiters: { until: () => boolean; resolve: () => void }[] = []

  constructor(options: CaptureSessionOptions) {
    this.#options = options
    this.#disks = options.disks.map(({ disk, key, sizeBytes }) => ({ disk, key, sizeBytes, capturedBytes: 0, lastAtMs: 0 }))
    this.#spill = options.spill && new SpillFile(options.spill)
    this.#queue = new SpillingQueue({
      ...(this.#spill === undefined ? {} : { spill: this.#spill }), startBytes: options.budgetBytes * SPILL_SHARE,
      onFailed: (why) => {
        // What was recorded is gone, also if capture is not attached now: this stream cannot go on.
        this.#wasInStep = false
        this.#letGo(`the spill failed: ${why}`)
        this.#wake()
      },
    })
    this.#smallSlabs = new SlabPool(SMALL_SLAB_BYTES, options.budgetBytes / 4)
    this.#largeSlabs = new SlabPool(MAX_WRITE_BYTES, options.budgetBytes / 4)
    this.#sealer = new SealingThread((why) => {
      this.#recorder.dispose()
      this.#wasInStep = false
      this.#letGo(`the sealing thread ended: ${why}`)
    })
    this.#recorder = new Recorder({
      queue: this.#queue,
      smallSlabs: this.#smallSlabs,
      largeSlabs: this.#largeSlabs,
      sealer: this.#sealer,
      nowUnixMs: options.nowUnixMs,
      lingerMs: options.lingerMs,
    })
    this.#queue.onPush = () => this.#onFrame()
    const { vm, vpg, vms, generation = FIRST_GENERATION, emit } = options
    const limit = options.rate && new RateLimit(new RateCell(options.rate))
    this.#link = new StreamLink({
      ...(limit === undefined ? {} : { limit }),
      queue: this.#queue, connect: options.connect, random: options.random,
      hello: (epoch, reason) => ({ protocol: STREAM_PROTOCOL, vm, vpg, vms, generation, epoch, disks: this.#entries(), reason, joins: true }),
      onUp: () => {
        emit({ is: 'link', up: true, why: '' })
        this.#wake()
      },
      onDown: (why) => {
        emit({ is: 'link', up: false, why })
        this.#wake()
      },
      onDisowned: ({ code, message, hint, context }) =>
        emit({ is: 'disowned', verdict: code === 'FENCED' ? 'superseded' : 'ahead', generation: Number(context.generation ?? generation + 1), message, ...(hint === undefined ? {} : { hint }) }),
      onOver: (why) => this.#letGo(why),
      onDurable: () => this.#wake(),
      onNews: (news) => emit({ is: 'news', news }),
    })
    this.#hashes = new StreamHashes(this.#link, (until) => this.#until(until))
    this.#target = new CaptureTarget({
      path: options.targetPath,
      disks: this.#disks,
      host: {
        recorder: this.#recorder,
        slabs: this.#largeSlabs,
        meter: this.#meter,
        stampBatch: () => {
          this.#cutLog.stamp(options.clock.read(), this.#recorder.lastSeq)
          if (this.#recorder.unsealedBytes > options.budgetBytes) setImmediate(() => this.#checkMemory())
        },
        holding: () => this.#hold.isOn,
        // After the answer: it is the last of this batch.
        onRefused: (key) => setImmediate(() => this.#letGo(`${key}: QEMU asked for something that is none of a mirror's requests`)),
        cutFromReads: (disk, offsetBytes, lengthBytes) => {
          if (this.#guard.busy) this.#guard.cut(disk, offsetBytes, lengthBytes)
          this.#round?.verify.wrote(disk, offsetBytes, lengthBytes)
        },
      },
      events: {
        opened: (key) => {
          this.#connections.set(key, (this.#connections.get(key) ?? 0) + 1)
          this.#ledger.opened(key)
          options.emit({ is: 'target', key, state: 'opened', clean: false, why: '', atUnixMs: options.nowUnixMs() })
        },
        closed: (key, clean, why) => {
          this.#connections.set(key, (this.#connections.get(key) ?? 1) - 1)
          this.#ledger.closed(key, clean, why)
          // What the guest wrote from here on is not captured, although it is acknowledged: no marker may follow, also when QEMU connects again.
          if (this.#connections.get(key) === 0) {
            this.#hold.end()
            this.#consistentFromSeq = Infinity
          }
          options.emit({ is: 'target', key, state: 'closed', clean, why, atUnixMs: options.nowUnixMs() })
        },
      },
    })
  }

  async start(): Promise<void> {
    this.#target.accepting = false
    // A spill that cannot be used is found when it is needed, and shown then.
    await this.#spill?.prepare().catch((error: unknown) => process.emitWarning(`spill: ${errorMessage(error)}`, { code: 'CDP_SPILL' }))
    await this.#target.listen()
  }

  async open({ reason, epoch, sizes }: Ask<'open'>): Answer<'open'> {
    await this.deliver()
    this.#grow(sizes ?? {})
    this.#wasInStep = false
    const { promise: welcomed, resolve } = Promise.withResolvers<Welcome>()
    const agentLostData = await this.#link.open(reason, (welcome) => {
      // The agent gives the numbers.
      for (const disk of this.#disks) {
        const given = welcome.disks.find(({ key }) => key === disk.key)
        disk.disk = given?.disk ?? disk.disk
        disk.joining = given?.joining
      }
      this.#recorder.begin(welcome.epoch, welcome.durableSeq, !welcome.baseComplete)
      this.#consistentFromSeq = Infinity
      this.#cutLog.reset(this.#options.clock.read(), welcome.durableSeq)
      this.#begin(epoch)
      resolve(welcome)
    })
    return { ...(await welcomed), agentLostData }
  }

  async deliver(): Answer<'deliver'> {
    this.#stopSync('a new attach begins')
    this.#target.letGo()
    await this.#deliverHistory()
    return {}
  }

  async rejoin({ epoch, sizes }: Ask<'rejoin'>): Answer<'rejoin'> {
    if (!this.#wasInStep || !this.#link.up || this.#attached) return { rejoined: false }
    this.#stopSync('capture begins again')
    this.#target.letGo()
    for (const { disk, sizeBytes } of this.#grow(sizes)) this.#recorder.range(RecordKind.resize, disk, sizeBytes, 0)
    this.#begin(epoch)
    return { rejoined: true }
  }

  async sync({ kind, reason, before, ...copy }: Ask<'sync'>): Answer<'sync'> {
    this.#mustBeAttached()
    const { signal } = this.#newSync('another sync begins')
    // A copy in the middle of a stream is one batch: no checkpoint stands in it.
    this.#consistentFromSeq = Infinity
    this.#recorder.mark(RecordKind.syncBegin, 0, { kind, reason, before })
    const sentBytes = await this.#copy(copy, { signal, readsInFlight: READS_IN_FLIGHT, admit: this.#admission(copy.rateBytesPerSec) })
    signal.throwIfAborted()
    this.#recorder.mark(RecordKind.syncEnd, 0, kind === 'delta' ? { kind, sentBytes } : { kind })
    this.#recorder.endDirect()
    this.#recorder.flush()
    this.#comeInStep()
    this.#endSync()
    return { lastSeq: this.#recorder.lastSeq }
  }

  async join(copy: Ask<'join'>): Answer<'join'> {
    if (!this.#isConsistent()) throw new CdpError('CONFLICT', 'capture is not in step', { retry: true })
    this.#join = this.#newSync('another copy begins')
    const { signal } = this.#join
    const pace = new CopyPace()
    const mayGoOn = (): boolean => pace.hasRoom(this.#queue.heldBytes + this.#recorder.unsealedBytes, this.#queue.durableBytes, performance.now())
    await this.#copy(copy, { signal, readsInFlight: JOIN_READS_IN_FLIGHT, admit: this.#admission(copy.rateBytesPerSec, mayGoOn) })
    signal.throwIfAborted()
    this.#recorder.flush()
    this.#endSync()
    return { lastSeq: this.#recorder.lastSeq }
  }

  async endJoin({ why }: Ask<'endJoin'>): Answer<'endJoin'> {
    if (this.#join !== undefined && this.#join === this.#sync) this.#stopSync(why)
    return {}
  }

  async joined({ disks }: Ask<'joined'>): Answer<'joined'> {
    if (!this.#isConsistent()) throw new CdpError('ABORTED', 'capture is not in step any more', { retry: true })
    for (const disk of this.#disks.filter((one) => disks.includes(one.disk))) {
      this.#recorder.range(RecordKind.joined, disk.disk, 0, 0)
      disk.joining = undefined
    }
    this.#recorder.flush()
    // A guest that writes nothing would name what is before it in every checkpoint.
    this.#cutLog.stamp(this.#options.clock.read(), this.#recorder.lastSeq)
    return { lastSeq: this.#recorder.lastSeq }
  }

  /** Until everything is recorded. @returns the bytes sent @throws what the NBD client throws, or why it was stopped */
  async #copy({ exportSocketPath, disks }: Ask<'join'>, { signal, readsInFlight, admit }: Pick<SyncOptions, 'signal' | 'readsInFlight' | 'admit'>): Promise<number> {
    const totalBytes = disks.reduce((sum, disk) => sum + disk.totalBytes, 0)
    let doneBytes = 0
    let sentBytes = 0
    for (const disk of disks) {
      await using client = await NbdClient.connect({ path: exportSocketPath }, {
        exportName: disk.exportName,
        metaContexts: ['base:allocation', ...(disk.bitmapContext === undefined ? [] : [disk.bitmapContext])],
        signal,
      })
      const before = doneBytes
      let copiedBytes = 0
      await new SyncRun({
        disk, client, sink: this.#recorder, guard: this.#guard, slabs: this.#largeSlabs, admit, readsInFlight, hashes: this.#hashes, signal,
        onProgress: (bytes, scannedToBytes, sent) => {
          copiedBytes += bytes
          sentBytes += sent
          doneBytes = before + (disk.bitmapContext === undefined || disk.byHash === true ? Math.max(scannedToBytes, disk.fromBytes) : copiedBytes)
          if (disk.byHash === true && scannedToBytes > disk.fromBytes) this.#progress.note(disk.disk, scannedToBytes, this.#recorder.lastSeq)
          const { durableSeq } = this.#link
          const durable = this.#progress.take(durableSeq)
          this.#options.emit({ is: 'sync', doneBytes, totalBytes, sentBytes, durableSeq, ...(durable === undefined ? {} : { durable }) })
        },
      }).run()
      doneBytes = before + disk.totalBytes
    }
    return sentBytes
  }

  /** Whatever sync runs is over. */
  #newSync(why: string): AbortController {
    this.#stopSync(why)
    return (this.#sync = new AbortController())
  }

  #endSync(): void {
    this.#sync = undefined
    this.#link.restHashes()
  }

  async inStep(): Answer<'inStep'> {
    this.#mustBeAttached()
    this.#recorder.flush()
    this.#comeInStep()
    return { lastSeq: this.#recorder.lastSeq }
  }

  async compare({ exportSocketPath, disks, ranges, rateBytesPerSec }: Ask<'compare'>): Answer<'compare'> {
    if (!this.#isConsistent()) throw new CdpError('CONFLICT', 'capture is not in step', { retry: true })
    await this.endCompare({ why: 'another comparison begins' })
    const abort = new AbortController()
    const { signal } = abort
    let comparedBytes = 0
    const verify = new VerifyRound({
      exportSocketPath, disks, slabs: this.#largeSlabs, hashes: this.#hashes, admit: this.#admission(rateBytesPerSec), readsInFlight: VERIFY_READS_IN_FLIGHT, signal,
      onProgress: (bytes) => (comparedBytes += bytes),
    })
    this.#round = { abort, verify }
    // What was recorded before the round began, and is not remembered by it, has to be below its position.
    const { lastSeq } = this.#recorder
    await this.#until(() => this.#link.durableSeq >= lastSeq || signal.aborted)
    signal.throwIfAborted()
    const left = await verify.compare(ranges)
    return { comparedBytes, left, suspects: verify.verdict().differences.length + verify.verdict().undecided.length }
  }

  async judge(): Answer<'judge'> {
    const round = this.#round
    if (round === undefined) throw new CdpError('ABORTED', 'the comparison was ended', { retry: true })
    // A connection that is gone may have taken a write with it.
    if (!this.#isConsistent()) throw new CdpError('ABORTED', 'capture is not in step any more', { retry: true })
    this.#round = undefined
    this.#link.restHashes()
    return round.verify.verdict()
  }

  async endCompare({ why }: Ask<'endCompare'>): Answer<'endCompare'> {
    if (this.#round === undefined) return {}
    this.#round.abort.abort(new CdpError('ABORTED', `verify stopped: ${why}`, { retry: true }))
    this.#round = undefined
    this.#link.restHashes()
    this.#wake()
    return {}
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
    if (this.#attached) this.#recorder.mark(RecordKind.proof, upToSeq ?? this.#recorder.lastSeq, { ...mark, fromSeq: this.#attachSeq })
    return {}
  }

  async captured(): Answer<'captured'> {
    return { seq: this.#recorder.lastSeq, bytes: Object.fromEntries(this.#disks.map(({ key, capturedBytes }) => [key, capturedBytes])) }
  }

  async lastCaptured(): Answer<'lastCaptured'> {
    const bootUnixMs = this.#options.nowUnixMs() - performance.now()
    return { epoch: this.#recorder.epoch, seq: this.#recorder.lastSeq, atUnixMs: Object.fromEntries(this.#disks.map(({ key, lastAtMs }) => [key, bootUnixMs + lastAtMs])) }
  }

  async beginRound({ reason }: Ask<'beginRound'>): Answer<'beginRound'> {
    this.#mustBeAttached()
    this.#stopSync('a round begins')
    // Like a copy in the middle of a stream: one batch, in which no checkpoint stands.
    this.#consistentFromSeq = Infinity
    this.#ledger.begin()
    this.#recorder.copying = true
    this.#recorder.mark(RecordKind.syncBegin, 0, { kind: 'bitmap', reason })
    return {}
  }

  async endRound({ mark }: Ask<'endRound'>): Answer<'endRound'> {
    const missing = this.#attached ? this.#ledger.missing(this.#disks.map(({ key }) => key)) : 'capture was let go'
    if (missing !== undefined) throw new CdpError('ABORTED', `not all of the round has arrived: ${missing}`, { retry: true })
    this.#ledger.end()
    this.#recorder.copying = false
    this.#recorder.mark(RecordKind.syncEnd, 0, { kind: 'bitmap' })
    this.#recorder.mark(RecordKind.checkpoint, this.#recorder.lastSeq, mark)
    this.#recorder.flush()
    return { lastSeq: this.#recorder.lastSeq }
  }

  async durable({ seq }: Ask<'durable'>): Answer<'durable'> {
    const attach = this.#attachSeq
    await this.#until(() => this.#link.durableSeq >= seq || !this.#attached || this.#attachSeq !== attach)
    if (this.#link.durableSeq < seq || this.#attachSeq !== attach) throw new CdpError('ABORTED', 'capture was let go before everything was durable', { retry: true, context: { seq } })
    return {}
  }

  async restartCopy(): Answer<'restartCopy'> {
    this.#mustBeAttached()
    for (const { disk } of this.#disks) this.#recorder.range(RecordKind.syncProgress, disk, 0, 0)
    this.#recorder.flush()
    return { lastSeq: this.#recorder.lastSeq }
  }

  async letGo({ why, inPeace }: Ask<'letGo'>): Answer<'letGo'> {
    this.#link.cancelOpen()
    this.#delivering?.abort()
    this.#wake()
    if (inPeace === true) this.#standDown(why)
    else {
      this.#letGo(why)
      this.#target.letGo()
    }
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
    if (++this.#ticks % TRIM_EVERY_TICKS === 0) for (const pool of [this.#smallSlabs, this.#largeSlabs]) pool.trim()
    const ack = this.#meter.take()
    const { slowAck } = this.#options
    this.#options.emit({
      is: 'stats',
      stats: {
        receivedSeq: this.#recorder.lastSeq, durableSeq: this.#link.durableSeq, heldBytes: this.#queue.heldBytes + this.#recorder.unsealedBytes,
        peakBytes: this.#queue.peakBytes, spilledBytes: this.#queue.spilledBytes, sentBytes: this.#link.sentBytes, linkUp: this.#link.up, ack, loopLateMs,
      },
    })
    const worstMs = Math.max(ack.maxUs / 1000, ack.held.maxUs / 1000, ack.count > 0 ? loopLateMs : 0)
    const p99Counts = ack.count >= MIN_ACKS_FOR_P99
    if (this.#attached && ((p99Counts && ack.p99Us / 1000 > slowAck.p99Ms) || worstMs > slowAck.maxMs)) {
      this.#letGo(`capture slow: acknowledgements took p99 ${Math.round(ack.p99Us / 1000)} ms, at worst ${Math.round(worstMs)} ms`)
    }
    const stalledMs = this.#target.stalledMs(performance.now())
    if (stalledMs > slowAck.maxMs) this.#letGo(`capture stalled: for ${Math.round(stalledMs)} ms the rest of a request has not come`)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#attached = false
    this.#delivering?.abort()
    this.#hold.end()
    this.#stopSync('capture stops')
    await this.#target[Symbol.asyncDispose]()
    await this.#link[Symbol.asyncDispose]()
    this.#recorder.dispose()
    await this.#sealer[Symbol.asyncDispose]()
    this.#queue.clear(0)
    await this.#spill?.[Symbol.asyncDispose]()
  }

  /**
   * What was captured before capture let go holds checkpoints that exist nowhere else: it goes to the agent before a new attach forgets it.
   * @throws CdpError UNREACHABLE while the link is down, ABORTED when it is told to let go meanwhile
   */
  async #deliverHistory(): Promise<void> {
    this.#recorder.flush()
    const { signal } = (this.#delivering = new AbortController())
    // Nothing more comes of a spill that failed.
    const delivered = (): boolean => this.#queue.isEmpty && this.#recorder.unsealedBytes === 0
    while (!delivered() && this.#link.goesOn) {
      if (!this.#link.up) {
        throw new CdpError('UNREACHABLE', `the link is down; ${this.#queue.heldBytes + this.#queue.spilledBytes} bytes of captured history wait for it`, { retry: true })
      }
      await this.#until(() => delivered() || !this.#link.up || signal.aborted)
      if (signal.aborted) throw new CdpError('ABORTED', 'the attach was given up', { retry: true })
    }
  }

  /** @throws CdpError ABORTED: capture was let go in the meantime, and what a copy would miss is not captured */
  #mustBeAttached(): void {
    if (!this.#attached) throw new CdpError('ABORTED', 'capture was let go before the copy began', { retry: true })
  }

  /** What was recorded up to now follows a base that the agent has. */
  #comeInStep(): void {
    this.#consistentFromSeq = this.#recorder.lastSeq
    this.#wasInStep = true
    this.#cutLog.stamp(this.#options.clock.read(), this.#recorder.lastSeq)
    for (const disk of this.#disks) disk.lastAtMs = performance.now()
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
    this.#checkMemory()
  }

  #checkMemory(): void {
    if (this.#queue.heldBytes + this.#recorder.unsealedBytes > this.#options.budgetBytes) {
      // Connections that are left for QEMU to end take memory as well.
      if (!this.#attached) this.#target.letGo()
      const spill = this.#queue.spilling ? `; spill: ${this.#queue.whyFull ?? 'its storage is slower than the guest writes'}` : ''
      this.#letGo(`${this.#link.up ? 'the link is slower than the guest writes' : 'the link is down'} and the memory is full${spill}`)
    }
  }

  #letGo(why: string): void {
    if (!this.#attached) return
    this.#standDown(why)
    this.#target.letGo()
    this.#options.emit({ is: 'letGo', why })
  }

  /** No cut, no sync any more; what QEMU still sends is taken. */
  #standDown(why: string): void {
    this.#attached = false
    this.#target.accepting = false
    this.#ledger.end()
    this.#consistentFromSeq = Infinity
    this.#hold.end()
    this.#stopSync(why)
  }

  #begin(epoch: Ask<'open'>['epoch']): void {
    this.#recorder.mark(RecordKind.epoch, 0, { ...epoch, disks: this.#entries() })
    this.#attachSeq = this.#recorder.lastSeq
    this.#attached = true
    this.#target.accepting = true
  }

  #entries(): DiskEntry[] {
    return this.#disks.map(({ disk, key, sizeBytes, joining }) => ({ disk, key, sizeBytes, ...(joining === undefined ? {} : { joining }) }))
  }

  /** Returns the disks that are larger now. */
  #grow(sizes: Record<string, number>): CapturedDisk[] {
    const grown = this.#disks.filter(({ key, sizeBytes }) => (sizes[key] ?? 0) > sizeBytes)
    for (const disk of grown) disk.sizeBytes = sizes[disk.key]
    return grown
  }

  #stopSync(why: string): void {
    this.#sync?.abort(new CdpError('ABORTED', `sync stopped: ${why}`))
    this.#sync = undefined
    this.#guard.clear()
    this.#progress.clear()
    void this.endCompare({ why })
    this.#wake()
  }

  /** Lets a sync read on only while memory has room, whatever else it is told to wait for is not so, and not faster than the limit (0: none). */
  #admission(rateBytesPerSec: number, mayGoOn = (): boolean => true): SyncOptions['admit'] {
    let nextMs = performance.now()
    const room = (): boolean => mayGoOn() && !this.#queue.spilling && this.#queue.heldBytes + this.#recorder.unsealedBytes < this.#options.budgetBytes * SYNC_SHARE
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
