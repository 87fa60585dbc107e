import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError, errorMessage, toCdpError } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { MAX_FRAME_BYTES } from '../../core/record/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import { Admission, staleEpoch } from './admission.ts'
import { BaseKeeper } from './base-keeper.ts'
import { DamageBook, readDamageFile } from './damage-book.ts'
import type { DamageFile } from './damage-book.ts'
import { DIRECT_COMMIT_BYTES, DIRECT_COMMIT_MS, DirectLog } from './direct-log.ts'
import { admitDisks, withJoining } from './disk-numbers.ts'
import { isFull, storeFull } from './store-full.ts'
import { isDiskMark } from './frame-checks.ts'
import type { DiskMark, JournalMark } from './frame-checks.ts'
import { FrameQueue } from './frame-queue.ts'
import type { QueuedFrame } from './frame-queue.ts'
import { JournalLog, SEGMENT_LIMITS } from './journal-log.ts'
import type { AppendBatch } from './journal-log.ts'
import { JournalReader } from './journal-reader.ts'
import type { FrameRecords, StoredFrame } from './journal-reader.ts'
import type { Damage, OpenReport, SegmentInfo } from './segment-info.ts'
import type { SegmentSealer } from './segment-sealer.ts'
import type { EpochAnswer, StoreCondition, VmStoreOptions } from './store-options.ts'
import { StateFile } from './state-file.ts'
import { freeBytes } from './free-space.ts'
import { MirrorStorage } from '../mirror/index.ts'
import { verifyJournal, verifySegmentOf } from './verify-journal.ts'
import type { VerifyReport } from './verify-journal.ts'
import type { VerifiedSegment } from './verify-segment.ts'
import { checkPreseeds, takePreseeds } from './preseed.ts'
import { afterMark, disksAt, loadVmState, newVmState, saveVmState, withDisks } from './vm-state.ts'
import type { VmState } from './vm-state.ts'

const COMMIT_BYTES = 16 * 1024 * 1024
const QUEUE_BYTES = 64 * 1024 * 1024

const afterMarks = (state: VmState, marks: readonly DiskMark[]): VmState => marks.reduce(afterMark, state)

/** The durable store of one VM: its epoch, its journal, and during the initial sync its mirror disks. */
export class VmStore implements AsyncDisposable {
  readonly vm: string
  readonly directory: string
  /** Called after each commit, with the newest sequence that will survive a crash. */
  onDurable: ((durableSeq: number, epoch: number) => void) | undefined
  /** Called before `onDurable` with the marks of the frames that became durable, in order; with none to try again what it refused. If it throws, the store is full or fails. */
  onRecords: ((marks: readonly JournalMark[]) => void) | undefined
  /** Called when the store stops taking frames: the streams of this VM must end. */
  onStopped: ((error: CdpError) => void) | undefined
  /** Called when a segment was sealed in the background. */
  onSealed: ((segment: SegmentInfo) => void) | undefined
  /** Called when a segment went into the mirror and its file is gone: nobody should keep it open. */
  onRemoved: ((path: string) => Promise<void>) | undefined
  readonly #log: Logger
  readonly #journal: JournalLog
  readonly #reader: JournalReader
  readonly #sealer: SegmentSealer
  readonly #recycle: ((bytes: Buffer) => void) | undefined
  readonly #queueBytes: number
  readonly #file: StateFile
  readonly #mirrors: MirrorStorage
  /** What moves the base up and takes the oldest segments away. */
  readonly base: BaseKeeper
  /** What of the journal and the mirror is known to be damaged. */
  readonly damageBook: DamageBook
  readonly #mayGrow: VmStoreOptions['mayGrow']
  readonly #queue = new FrameQueue()
  #direct: DirectLog | undefined
  #condition: StoreCondition = 'open'
  #stoppedBy: CdpError | undefined
  readonly #admission = new Admission()
  #running: Promise<void> | undefined
  #flushing = false
  #closing = false
  #wake: (() => void) | undefined
  #attaching: Promise<unknown> = Promise.resolve()

  private constructor(options: VmStoreOptions, state: VmState, journal: JournalLog, damage: DamageFile) {
    this.vm = options.vm
    this.directory = options.directory
    this.#log = options.log
    this.#sealer = options.sealer
    this.#recycle = options.recycle
    this.#journal = journal
    this.#reader = new JournalReader(journal.segments, journal.damage, options.limits?.openFiles)
    this.#queueBytes = Math.max(MAX_FRAME_BYTES, options.limits?.queueBytes ?? QUEUE_BYTES)
    this.#file = new StateFile(join(options.directory, 'vm.json'), state)
    this.#mayGrow = options.mayGrow
    this.#mirrors = options.mirrors ?? new MirrorStorage({ vmDirectory: options.directory })
    this.damageBook = new DamageBook(options.directory, journal.damage, damage)
    this.damageBook.baseMoved(state.baseSeq)
    this.base = new BaseKeeper({
      directory: options.directory, mirrors: this.#mirrors, vm: options.vm, journal, file: this.#file, damage: this.damageBook, log: options.log,
      onRemoved: async (path) => {
        await this.#reader.forget(path)
        await this.onRemoved?.(path)
      },
    })
    this.#admission.reset(state, this.durableSeq)
    journal.onSealed = (segment) => this.onSealed?.(segment)
  }

  /**
   * Opens the store of a VM and creates it if there is none. Only unsealed segments are scanned; a torn tail is cut, and what was
   * found is in `openReport` and `damage()`.
   * @throws CdpError FORMAT if vm.json cannot be believed, or is missing beside a journal
   */
  static async open(options: VmStoreOptions): Promise<VmStore> {
    await mkdir(join(options.directory, 'runs'), { recursive: true })
    const statePath = join(options.directory, 'vm.json')
    const found = await loadVmState(statePath)
    if (found !== undefined && found.vm !== options.vm) throw new CdpError('FORMAT', `the directory belongs to VM ${found.vm}`, { context: { directory: options.directory } })
    const state = found ?? newVmState(options.vm)
    const limits = { segmentBytes: options.limits?.segmentBytes ?? SEGMENT_LIMITS.segmentBytes, segmentRecords: options.limits?.segmentRecords ?? SEGMENT_LIMITS.segmentRecords }
    await using held = new AsyncDisposableStack()
    const { log: journal, diskMarks } = await JournalLog.open({ ...options, limits }, state.baseComplete ? state.baseSeq : state.directSeq)
    held.use(journal)
    const damage = await readDamageFile(options.directory, options.log)
    if (found === undefined) {
      if (journal.segments.length > 0) {
        throw new CdpError('FORMAT', 'there is a journal, but no vm.json', { hint: 'Put vm.json back from a backup; without it nobody knows what the mirror holds.', context: { directory: options.directory } })
      }
      await saveVmState(statePath, state)
    }
    held.move()
    const store = new VmStore(options, state, journal, damage)
    await store.#replay(diskMarks)
    store.#logOpened()
    store.#mirrors.start()
    return store
  }

  get #state(): VmState {
    return this.#file.state
  }
  get condition(): StoreCondition {
    return this.#condition
  }
  get epoch(): number {
    return this.#state.epoch
  }
  /** The newest sequence that survives a crash. */
  get durableSeq(): number {
    return this.#state.baseComplete ? this.#journal.durableSeq : this.#state.directSeq
  }
  /** The newest sequence taken; it may be lost as long as it is above `durableSeq`. */
  get receivedSeq(): number {
    return this.#admission.receivedSeq
  }
  /** What the mirror holds, once the base is complete. */
  get baseSeq(): number {
    return this.#state.baseSeq
  }
  get baseComplete(): boolean {
    return this.#state.baseComplete
  }
  get disks(): readonly DiskEntry[] {
    return this.#state.disks
  }
  /** As of a sequence of the history. */
  disksAt(seq: number): readonly DiskEntry[] {
    return disksAt(this.#state, seq)
  }
  /** Bytes accepted and not yet durable. */
  get queuedBytes(): number {
    return this.#queue.bytes
  }
  get journalBytes(): number {
    return this.#journal.bytes
  }
  get segments(): readonly SegmentInfo[] {
    return this.#journal.segments
  }
  get openReport(): Readonly<OpenReport> {
    return this.#journal.report
  }

  /** What opening, reading, sealing and verifying found so far. */
  damage(): readonly Damage[] {
    return this.#journal.damage.all()
  }

  /**
   * A new attach: the next epoch, durable before it is answered, with the numbers of its disks. Frames of older epochs are refused from now on; those taken
   * before are made durable first.
   * @throws CdpError BAD_INPUT for impossible disks, CONFLICT for a preseed that does not fit, IO with context.condition if the store is full or failed
   */
  beginEpoch(disks: readonly DiskEntry[], options: { /** The sender copies disks that come beside checkpoints. */ joins?: boolean } = {}): Promise<EpochAnswer> {
    return this.#attach(async () => {
      const numbered = await admitDisks(this.directory, this.#state.disks, disks)
      if (!this.#state.baseComplete) await checkPreseeds(this.directory, this.#mirrors, numbered)
      await this.#mirrors.check(numbered)
      return async () => {
        await this.#closeDirect()
        // What was taken until now has become durable: a disk may have joined with it.
        const { disks: known, baseComplete } = this.#state
        const admitted = baseComplete && options.joins === true ? withJoining(known, numbered) : numbered
        await this.#file.update((state) => ({ ...withDisks(state, admitted, this.durableSeq), epoch: state.epoch + 1 }))
        await this.#takePreseeds()
        // Every disk has a mirror from its first attach on, so that its number is never given to another one.
        this.#direct = await DirectLog.open(this.directory, this.#mirrors, this.#state)
        if (this.#state.baseComplete) await this.#closeDirect()
      }
    })
  }

  /**
   * The attach `epoch` goes on after a broken connection.
   * @throws CdpError STALE_EPOCH if it is not the newest, IO as above
   */
  resumeEpoch(epoch: number): Promise<EpochAnswer> {
    return this.#attach(async () => {
      if (epoch !== this.#state.epoch || epoch === 0) throw staleEpoch(epoch, this.#state.epoch)
      return async () => undefined
    })
  }

  /**
   * Takes a whole frame as received; the bytes belong to the store from here on. A frame already held is skipped.
   * @throws CdpError CHECKSUM, FORMAT, STREAM_PROTOCOL (gap, wrong mode, record outside its disk), STALE_EPOCH, IO with
   * context.condition (full, failed), CLOSED; nothing of the frame was taken then
   */
  accept(bytes: Buffer): void {
    if (this.#closing || this.#condition !== 'open') throw this.#refusal()
    if (this.#queue.bytes + bytes.length > this.#queueBytes) {
      throw new CdpError('CONFLICT', 'more frames than may wait to be durable', { retry: true, context: { queuedBytes: this.#queue.bytes } })
    }
    const taken = this.#admission.take(bytes)
    if (taken === undefined) return
    this.#queue.push(taken)
    this.#wake?.()
    this.#running ??= this.#run()
  }

  /** Resolves when everything accepted so far is durable, or the store has stopped. */
  async flush(): Promise<void> {
    this.#flushing = true
    try {
      while (this.#running !== undefined) {
        this.#wake?.()
        await this.#running
      }
    } finally {
      this.#flushing = false
    }
  }

  /** @throws CdpError NOT_FOUND, JOURNAL_DAMAGED (context: segment, firstSeq, lastSeq) */
  readFrame(segmentNumber: number, frameOffset: number): Promise<StoredFrame> {
    return this.#reader.readFrame(segmentNumber, frameOffset)
  }

  /** Headers and tables of the frames of a segment in sequence order; views, valid until the next step. @throws CdpError NOT_FOUND, JOURNAL_DAMAGED */
  recordsOf(segmentNumber: number, range: { fromSeq?: number; toSeq?: number } = {}): AsyncGenerator<FrameRecords, void, undefined> {
    return this.#reader.recordsOf(segmentNumber, range)
  }

  /** Every mark in the journal from `fromSeq` on, in order: what a catalogue is rebuilt from. Damage is noted and stepped over. */
  marks(fromSeq = 0): AsyncGenerator<JournalMark, void, undefined> {
    return this.#reader.marks(fromSeq)
  }

  /** Reads one segment from end to end in the sealing worker, as far as it is durable now. @throws CdpError IO, CLOSED */
  verifySegment(info: SegmentInfo, rateBytesPerSec?: number): Promise<VerifiedSegment> {
    return verifySegmentOf(this.#journal, this.#sealer, info, rateBytesPerSec)
  }

  /** Header, run or trailer of a sealed segment are made again from its frames. */
  sealAgain(info: SegmentInfo): void {
    this.#journal.sealAgain(info)
  }

  /** Reads the whole journal in the sealing worker; what it finds is also in `damage()` from then on. */
  verify(options: { signal?: AbortSignal } = {}): Promise<VerifyReport> {
    return verifyJournal(this.#journal, this.#sealer, options)
  }

  /** Resolves when no segment is being sealed. */
  sealingIdle(): Promise<void> {
    return this.#journal.sealingIdle()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closing = true
    await this.#attaching
    await this.flush()
    this.#condition = 'closed'
    await this.#closeDirect()
    await this.base[Symbol.asyncDispose]()
    await this.#mirrors[Symbol.asyncDispose]()
    await this.#journal[Symbol.asyncDispose]()
    await this.#reader[Symbol.asyncDispose]()
  }

  async #takePreseeds(): Promise<void> {
    if (this.#state.baseComplete) return
    const { taken, late } = await takePreseeds(this.directory, this.#mirrors, this.#state.disks)
    if (taken.length > 0) this.#log.info('preseeded disks are the mirror', { vm: this.vm, disks: taken.join(' ') })
    if (late.length > 0) this.#log.warn('a preseed came too late: its disk has a mirror already', { vm: this.vm, disks: late.join(' ') })
  }

  /** `check` refuses without any effect; what it answers is done when nothing is taken and all that was is durable. */
  #attach(check: () => Promise<() => Promise<void>>): Promise<EpochAnswer> {
    const attached = this.#attaching.then(async () => {
      if (this.#condition === 'full') await this.#leaveFull()
      if (this.#closing || this.#condition !== 'open') throw this.#refusal()
      const begin = await check()
      this.#admission.takenEpoch = undefined
      await this.flush()
      this.#mustBeOpen()
      try {
        await begin()
      } catch (error) {
        await this.#stop(error)
        throw this.#refusal()
      }
      this.#admission.reset(this.#state, this.durableSeq)
      const { epoch, baseComplete, syncProgress, disks } = this.#state
      this.#admission.takenEpoch = epoch
      return { epoch, durableSeq: this.durableSeq, baseComplete, syncProgress, disks }
    })
    this.#attaching = attached.catch(() => undefined)
    return attached
  }

  #mustBeOpen(): void {
    if (this.#condition !== 'open') throw this.#refusal()
  }

  async #closeDirect(): Promise<void> {
    const direct = this.#direct
    this.#direct = undefined
    await direct?.[Symbol.asyncDispose]()
  }

  async #run(): Promise<void> {
    try {
      for (let first = this.#queue.peek(); first !== undefined && this.#condition === 'open'; first = this.#queue.peek()) {
        if (first.direct) await this.#commitDirect()
        else await this.#commitJournal(first)
      }
    } catch (error) {
      await this.#stop(error)
    } finally {
      this.#running = undefined
    }
  }

  async #commitJournal(first: QueuedFrame): Promise<void> {
    const journal = this.#journal
    const refusal = this.#mayGrow?.(journal.bytes)
    if (refusal !== undefined) throw refusal
    if (!journal.isEmpty && !journal.hasRoom(first.bytes.length, first.frame.header.recordCount)) await journal.roll(first.frame.header.firstSeq)
    const batch: AppendBatch = { buffers: [], lengthBytes: 0, recordCount: 0, lastSeq: 0, firstAtUnixMs: first.frame.header.atUnixMs, lastAtUnixMs: 0 }
    let marks: JournalMark[] | undefined
    for (let next: QueuedFrame | undefined = first; next !== undefined && !next.direct; next = this.#queue.peek()) {
      const { header } = next.frame
      const lengthBytes = batch.lengthBytes + next.bytes.length
      const fits = batch.recordCount === 0 || (lengthBytes <= COMMIT_BYTES && journal.hasRoom(lengthBytes, batch.recordCount + header.recordCount))
      if (!fits) break
      this.#queue.take()
      batch.buffers.push(next.bytes)
      batch.lengthBytes = lengthBytes
      batch.recordCount += header.recordCount
      batch.lastSeq = header.lastSeq
      batch.lastAtUnixMs = header.atUnixMs
      if (next.marks !== undefined) marks = marks === undefined ? next.marks : marks.concat(next.marks)
    }
    await journal.append(batch)
    if (this.#recycle !== undefined) for (const bytes of batch.buffers) this.#recycle(bytes)
    this.#queue.release(batch.lengthBytes)
    const diskMarks = (marks ?? []).filter(isDiskMark)
    // A store that is opened again has them from the journal.
    if (diskMarks.length > 0) this.#file.note((state) => afterMarks(state, diskMarks))
    if (!(await this.#takeMarks(marks))) return
    await this.#saveNoted()
    this.#acknowledge()
    await journal.writeHint()
  }

  async #commitDirect(): Promise<void> {
    const direct = (this.#direct ??= await DirectLog.open(this.directory, this.#mirrors, this.#state))
    const deadlineMs = performance.now() + DIRECT_COMMIT_MS
    let appliedBytes = 0
    let marks: JournalMark[] | undefined
    let ended = false
    while (appliedBytes < DIRECT_COMMIT_BYTES && !ended) {
      const next = this.#queue.take()
      if (next === undefined) {
        const waitMs = deadlineMs - performance.now()
        if (waitMs <= 0 || this.#flushing) break
        await this.#waitForWork(waitMs)
        continue
      }
      await direct.apply(next)
      this.#queue.release(next.bytes.length)
      appliedBytes += next.bytes.length
      this.#recycle?.(next.bytes)
      if (next.marks !== undefined) marks = marks === undefined ? next.marks : marks.concat(next.marks)
      ended = next.endsBase
    }
    const state = await direct.commit()
    if (state.baseComplete) this.#journal.begin(state.baseSeq)
    this.#file.adopt(state)
    if (state.baseComplete) await this.#closeDirect()
    if (await this.#takeMarks(marks)) this.#acknowledge()
  }

  #waitForWork(waitMs: number): Promise<void> {
    return new Promise((resolve) => {
      const done = (): void => {
        clearTimeout(timer)
        this.#wake = undefined
        resolve()
      }
      const timer = setTimeout(done, waitMs)
      this.#wake = done
    })
  }

  /** What the journal says of the disks and vm.json may not: a crash came between the two. */
  async #replay(diskMarks: readonly DiskMark[]): Promise<void> {
    const replayed = (state: VmState): VmState => afterMarks(state, diskMarks.filter(({ epoch }) => epoch === state.epoch))
    if (JSON.stringify(replayed(this.#state)) === JSON.stringify(this.#state)) return
    this.#file.note(replayed)
    this.#admission.reset(this.#state, this.durableSeq)
    await this.#saveNoted().catch((error: unknown) => this.#log.warn('vm.json does not say yet what the journal says of the disks', { vm: this.vm, error: errorMessage(error) }))
  }

  /** For whoever reads the file. */
  async #saveNoted(): Promise<void> {
    if (this.#file.isBehind) await this.#file.update((state) => state)
  }

  /** False: marks that are not taken must not be acknowledged. The store has stopped, and whoever opens it again replays them from the journal. */
  async #takeMarks(marks: readonly JournalMark[] | undefined): Promise<boolean> {
    try {
      if (marks !== undefined) this.onRecords?.(marks)
      return true
    } catch (cause) {
      await this.#stop(isFull(cause) ? cause : new CdpError('IO', `the marks of the journal were not taken: ${errorMessage(cause)}`, { cause }))
      return false
    }
  }

  #acknowledge(): void {
    try {
      this.onDurable?.(this.durableSeq, this.#state.epoch)
    } catch (error) {
      this.#log.error('a listener of the journal failed', { vm: this.vm, error: errorMessage(error) })
    }
  }

  /** Nothing that waits was promised: it is forgotten, and the stream sends it again when it comes back. */
  async #stop(error: unknown): Promise<void> {
    if (this.#condition !== 'open') return
    this.#queue.clear()
    this.#admission.reset(this.#state, this.durableSeq)
    const full = isFull(error)
    this.#condition = full ? 'full' : 'failed'
    if (full) {
      try {
        await this.#closeDirect()
        await this.#journal.cutBack()
      } catch (cause) {
        this.#condition = 'failed'
        this.#log.error('the end of the journal could not be cut back', { vm: this.vm, error: errorMessage(cause) })
      }
    }
    this.#stoppedBy = toCdpError(error, 'IO')
    this.#log.error(full ? 'no room for the journal' : 'the journal failed', { vm: this.vm, durableSeq: this.durableSeq, error: errorMessage(error) })
    this.onStopped?.(this.#refusal())
  }

  async #leaveFull(): Promise<void> {
    if ((await freeBytes(this.directory)) < COMMIT_BYTES || this.#mayGrow?.(this.#journal.bytes) !== undefined) throw this.#refusal()
    try {
      // What is durable here and was not taken where the marks go is taken before it is acknowledged.
      this.onRecords?.([])
      await this.#saveNoted()
    } catch (error) {
      if (isFull(error)) throw this.#refusal()
      throw error
    }
    this.#condition = 'open'
    this.#stoppedBy = undefined
    this.#journal.resumeSealing()
  }

  #refusal(): CdpError {
    if (this.#condition === 'full') return storeFull(this.vm, this.#stoppedBy)
    if (this.#closing) return new CdpError('CLOSED', 'the store of this VM is closed', { context: { vm: this.vm } })
    return new CdpError('IO', 'the journal of this VM failed and takes nothing more', {
      cause: this.#stoppedBy,
      hint: 'Look at the storage below it; the store is opened again, and scanned, with the next connection or restart.',
      context: { vm: this.vm, condition: this.#condition },
    })
  }

  #logOpened(): void {
    const { tornTail, resealed } = this.#journal.report
    if (tornTail !== undefined) this.#log.warn('the torn end of a journal was cut', { vm: this.vm, ...tornTail })
    if (resealed.length > 0) this.#log.info('segments are sealed again', { vm: this.vm, segments: resealed.length, first: resealed[0] })
    for (const damage of this.#journal.damage.all().slice(0, 16)) this.#log.error('a part of the journal is damaged', { vm: this.vm, ...damage })
  }
}
