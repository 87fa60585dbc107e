import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError, errorCode, errorMessage, toCdpError } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { MAX_FRAME_BYTES, parseFrame } from '../../core/record/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import { DIRECT_COMMIT_BYTES, DIRECT_COMMIT_MS, DirectLog, resized } from './direct-log.ts'
import { admitDisks, storeFull } from './epoch-rules.ts'
import { checkRecords, isDirect, marksOf } from './frame-admission.ts'
import type { DiskSizes, JournalMark } from './frame-admission.ts'
import { FrameQueue } from './frame-queue.ts'
import type { QueuedFrame } from './frame-queue.ts'
import { JournalLog, SEGMENT_LIMITS } from './journal-log.ts'
import type { AppendBatch, Clock, SegmentLimits } from './journal-log.ts'
import { JournalReader } from './journal-reader.ts'
import type { FrameRecords, StoredFrame } from './journal-reader.ts'
import type { Damage, OpenReport, SegmentInfo } from './segment-info.ts'
import type { SegmentSealer } from './segment-sealer.ts'
import { freeBytes } from './free-space.ts'
import { verifyJournal } from './verify-journal.ts'
import type { VerifyReport } from './verify-journal.ts'
import { loadVmState, newVmState, saveVmState } from './vm-state.ts'
import type { VmState } from './vm-state.ts'

export type VmStoreOptions = {
  /** Directory of this VM: vm.json, durable.hint, journal/, runs/ and mirror/ stand in it. Created if missing. */
  directory: string
  /** Site VM id, at most 36 bytes. */
  vm: string
  log: Logger
  clock: Clock
  sealer: SegmentSealer
  limits?: Partial<SegmentLimits> & {
    /** What may wait to be durable; `accept` refuses beyond. At least one frame of the largest size. */
    queueBytes?: number
    /** Files open for reading. */
    openFiles?: number
  }
}

/** What an attach is told; becomes the `welcome` of the stream. */
export type EpochAnswer = { epoch: number; durableSeq: number; baseComplete: boolean; syncProgress: Record<string, number>; disks: DiskEntry[] }

/**
 * open: frames are taken. full: the file system is full, nothing is taken until an attach finds room again. failed: a write or an
 * fsync failed; nothing more is promised, reading goes on; dispose and open again (which scans). closed: disposed.
 */
export type StoreCondition = 'open' | 'full' | 'failed' | 'closed'

const COMMIT_BYTES = 16 * 1024 * 1024
const QUEUE_BYTES = 64 * 1024 * 1024

/** The durable store of one VM: its epoch, its journal, and during the initial sync its mirror disks. */
export class VmStore implements AsyncDisposable {
  readonly vm: string
  readonly directory: string
  /** Called after each commit, with the newest sequence that will survive a crash. */
  onDurable: ((durableSeq: number, epoch: number) => void) | undefined
  /** Called before `onDurable` with the marks of the frames that became durable, in order. */
  onRecords: ((marks: readonly JournalMark[]) => void) | undefined
  /** Called when the store stops taking frames: the streams of this VM must end. */
  onStopped: ((error: CdpError) => void) | undefined
  /** Called when a segment was sealed in the background. */
  onSealed: ((segment: SegmentInfo) => void) | undefined
  readonly #log: Logger
  readonly #journal: JournalLog
  readonly #reader: JournalReader
  readonly #sealer: SegmentSealer
  readonly #queueBytes: number
  readonly #statePath: string
  readonly #queue = new FrameQueue()
  #state: VmState
  #direct: DirectLog | undefined
  #condition: StoreCondition = 'open'
  #stoppedBy: CdpError | undefined
  /** The epoch whose frames are taken now; undefined until an attach began or went on. */
  #takenEpoch: number | undefined
  #receivedSeq: number
  #receivedBase: boolean
  #sizes: DiskSizes
  #running: Promise<void> | undefined
  #flushing = false
  #closing = false
  #wake: (() => void) | undefined
  #attaching: Promise<unknown> = Promise.resolve()

  private constructor(options: VmStoreOptions, state: VmState, journal: JournalLog) {
    this.vm = options.vm
    this.directory = options.directory
    this.#log = options.log
    this.#sealer = options.sealer
    this.#journal = journal
    this.#reader = new JournalReader(journal.segments, journal.damage, options.limits?.openFiles)
    this.#queueBytes = Math.max(MAX_FRAME_BYTES, options.limits?.queueBytes ?? QUEUE_BYTES)
    this.#statePath = join(options.directory, 'vm.json')
    this.#state = state
    this.#receivedSeq = this.durableSeq
    this.#receivedBase = state.baseComplete
    this.#sizes = sizesOf(state.disks)
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
    let state = found ?? newVmState(options.vm)
    const limits = { segmentBytes: options.limits?.segmentBytes ?? SEGMENT_LIMITS.segmentBytes, segmentRecords: options.limits?.segmentRecords ?? SEGMENT_LIMITS.segmentRecords }
    await using held = new AsyncDisposableStack()
    const { log: journal, resizes } = await JournalLog.open({ ...options, limits }, state.baseComplete ? state.baseSeq : state.directSeq)
    held.use(journal)
    if (found === undefined) {
      if (journal.segments.length > 0) {
        throw new CdpError('FORMAT', 'there is a journal, but no vm.json', { hint: 'Put vm.json back from a backup; without it nobody knows what the mirror holds.', context: { directory: options.directory } })
      }
      await saveVmState(statePath, state)
    }
    for (const { epoch, disk, sizeBytes } of resizes) if (epoch === state.epoch) state = { ...state, disks: resized(state.disks, disk, sizeBytes) }
    held.move()
    const store = new VmStore(options, state, journal)
    store.#logOpened()
    return store
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
    return this.#receivedSeq
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
  /** Bytes accepted and not yet durable. */
  get queuedBytes(): number {
    return this.#queue.bytes
  }
  get journalBytes(): number {
    return this.#journal.bytes
  }
  get segments(): readonly Readonly<SegmentInfo>[] {
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
   * A new attach: the next epoch, durable before it is answered. Frames of older epochs are refused from now on; those taken
   * before are made durable first.
   * @throws CdpError CONFLICT if the disks contradict those known, IO with context.condition if the store is full or failed
   */
  beginEpoch(disks: readonly DiskEntry[]): Promise<EpochAnswer> {
    return this.#attach(async () => {
      const admitted = await admitDisks(this.directory, this.#state.disks, disks)
      return async () => {
        await this.#closeDirect()
        await this.#save({ ...this.#state, epoch: this.#state.epoch + 1, disks: admitted })
        // Every disk has a mirror from its first attach on, so that its number is never given to another one.
        this.#direct = await DirectLog.open(this.directory, this.#state)
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
    const frame = parseFrame(bytes)
    const { header } = frame
    if (bytes.length !== 64 + header.bodyBytes) throw new CdpError('FORMAT', 'bytes behind the end of a frame', { context: { bytes: bytes.length } })
    if (header.epoch !== this.#takenEpoch) {
      if (header.epoch <= this.#state.epoch) throw staleEpoch(header.epoch, this.#state.epoch)
      throw new CdpError('STREAM_PROTOCOL', 'frame of an epoch that was never given', { context: { epoch: header.epoch, newest: this.#state.epoch } })
    }
    if (header.lastSeq <= this.#receivedSeq) return
    if (header.firstSeq !== this.#receivedSeq + 1) {
      const what = header.firstSeq > this.#receivedSeq ? 'gap in the sequence' : 'frame of which a part is held'
      throw new CdpError('STREAM_PROTOCOL', what, { context: { firstSeq: header.firstSeq, lastSeq: header.lastSeq, receivedSeq: this.#receivedSeq } })
    }
    const direct = isDirect(header)
    if (direct === this.#receivedBase) {
      throw new CdpError('STREAM_PROTOCOL', direct ? 'direct frame after the initial sync' : 'journal frame before the end of the initial sync', { context: { firstSeq: header.firstSeq } })
    }
    if (this.#queue.bytes + bytes.length > this.#queueBytes) {
      throw new CdpError('CONFLICT', 'more frames than may wait to be durable', { retry: true, context: { queuedBytes: this.#queue.bytes } })
    }
    const marks = marksOf(frame)
    const endsBase = direct && marks?.some((mark) => mark.is === 'syncEnd' && mark.mark.kind === 'initial') === true
    if (endsBase && marks?.at(-1)?.seq !== header.lastSeq) throw new CdpError('STREAM_PROTOCOL', 'the initial sync must end with its frame', { context: { lastSeq: header.lastSeq } })
    const sizes = marks?.some((mark) => mark.is === 'resize') === true ? new Map(this.#sizes) : this.#sizes
    checkRecords(frame, sizes)
    this.#sizes = sizes
    if (endsBase) this.#receivedBase = true
    this.#receivedSeq = header.lastSeq
    this.#queue.push({ bytes, frame, marks, direct, endsBase })
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

  /** Scrub: reads the whole journal in the sealing worker; what it finds is also in `damage()` from then on. */
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
    await this.#journal[Symbol.asyncDispose]()
    await this.#reader[Symbol.asyncDispose]()
  }

  /** `check` refuses without any effect; what it answers is done when nothing is taken and all that was is durable. */
  #attach(check: () => Promise<() => Promise<void>>): Promise<EpochAnswer> {
    const attached = this.#attaching.then(async () => {
      if (this.#condition === 'full') await this.#leaveFull()
      if (this.#closing || this.#condition !== 'open') throw this.#refusal()
      const begin = await check()
      this.#takenEpoch = undefined
      await this.flush()
      this.#mustBeOpen()
      try {
        await begin()
      } catch (error) {
        await this.#stop(error)
        throw this.#refusal()
      }
      this.#receivedSeq = this.durableSeq
      this.#receivedBase = this.#state.baseComplete
      this.#sizes = sizesOf(this.#state.disks)
      const { epoch, baseComplete, syncProgress, disks } = this.#state
      this.#takenEpoch = epoch
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
    await this.#keepSizes(marks)
    this.#queue.release(batch.lengthBytes)
    this.#announce(marks)
    await journal.writeHint()
  }

  async #keepSizes(marks: JournalMark[] | undefined): Promise<void> {
    let { disks } = this.#state
    for (const mark of marks ?? []) if (mark.is === 'resize') disks = resized(disks, mark.disk, mark.sizeBytes)
    if (disks !== this.#state.disks) await this.#save({ ...this.#state, disks })
  }

  async #commitDirect(): Promise<void> {
    const direct = (this.#direct ??= await DirectLog.open(this.directory, this.#state))
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
      if (next.marks !== undefined) marks = marks === undefined ? next.marks : marks.concat(next.marks)
      ended = next.endsBase
    }
    const state = await direct.commit()
    if (state.baseComplete) this.#journal.begin(state.baseSeq)
    this.#state = state
    if (state.baseComplete) await this.#closeDirect()
    this.#announce(marks)
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

  #announce(marks: readonly JournalMark[] | undefined): void {
    try {
      if (marks !== undefined) this.onRecords?.(marks)
      this.onDurable?.(this.durableSeq, this.#state.epoch)
    } catch (error) {
      this.#log.error('a listener of the journal failed', { vm: this.vm, error: errorMessage(error) })
    }
  }

  async #save(state: VmState): Promise<void> {
    await saveVmState(this.#statePath, state)
    this.#state = state
  }

  /** Nothing that waits was promised: it is forgotten, and the stream sends it again when it comes back. */
  async #stop(error: unknown): Promise<void> {
    if (this.#condition !== 'open') return
    this.#queue.clear()
    this.#receivedSeq = this.durableSeq
    this.#receivedBase = this.#state.baseComplete
    this.#takenEpoch = undefined
    const full = errorCode(error) === 'ENOSPC' || errorCode(error) === 'EDQUOT'
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
    this.#log.error(full ? 'no space left for the journal' : 'the journal failed', { vm: this.vm, durableSeq: this.durableSeq, error: errorMessage(error) })
    this.onStopped?.(this.#refusal())
  }

  async #leaveFull(): Promise<void> {
    if ((await freeBytes(this.directory)) < COMMIT_BYTES) throw this.#refusal()
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

const sizesOf = (disks: readonly DiskEntry[]): DiskSizes => new Map(disks.map(({ disk, sizeBytes }) => [disk, sizeBytes]))

const staleEpoch = (epoch: number, newest: number): CdpError =>
  new CdpError('STALE_EPOCH', 'a newer attach of this VM owns the journal', { context: { epoch, newest } })
