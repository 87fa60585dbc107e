import { rm } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError, toCdpError } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { FilePool, IndexView, PageCache, removeRunsBelow } from '../index/index.ts'
import type { JournalLog } from './journal-log.ts'
import { checkMirror } from './check-mirror.ts'
import type { CheckedMirror } from './check-mirror.ts'
import type { DamageBook } from './damage-book.ts'
import { damagedExtents, isReached } from './damage-reach.ts'
import { damageWithin, promoteRecords, readThrough } from './promote-records.ts'
import type { PromotionJob, PromotionPace } from './promote-records.ts'
import { PromotionTarget } from './promotion-target.ts'
import type { MirrorStorage } from '../mirror/index.ts'
import type { Damage } from './segment-info.ts'
import type { StateFile } from './state-file.ts'
import { recoverableFrom, syncDirectory } from './vm-state.ts'

export type BaseKeeperOptions = {
  directory: string; mirrors: MirrorStorage; vm: string; journal: JournalLog; file: StateFile; damage: DamageBook; log: Logger
  /** A segment's file is gone. */
  onRemoved: (path: string) => Promise<void>
}

export type PromotionProgress = { doneBytes: number; totalBytes: number }
export type PromoteOptions = { pace?: PromotionPace; /** Journal read between two writes to the mirror, about. */ batchBytes?: number; onProgress?: (progress: PromotionProgress) => void; signal?: AbortSignal }

const PAGE_CACHE_BYTES = 8 * 1024 * 1024
const OPEN_FILES = 32

/**
 * The base of one VM: moves its mirror up to a later record, and takes away the segments that are below it then. Beside the way of
 * a write: nothing of it is ever waited for there. The order of steps is what a crash leaves behind in a state that can be gone on from:
 * intent durable (vm.json promotingToSeq), mirror written, mirror durable, new baseSeq durable, segments removed one by one.
 */
export class BaseKeeper implements AsyncDisposable {
  readonly #options: BaseKeeperOptions
  readonly #closing = new AbortController()
  #running: Promise<unknown> = Promise.resolve()
  /** A crash may have left runs behind that nobody needs. */
  #runsLookedAt = false

  constructor(options: BaseKeeperOptions) {
    this.#options = options
  }

  get baseSeq(): number {
    return this.#options.file.state.baseSeq
  }

  /** Where an interrupted promotion was going to. */
  get promotingToSeq(): number | undefined {
    return this.#options.file.state.promotingToSeq
  }

  /** Records below this one can not be recovered (any more). */
  get recoverableFromSeq(): number {
    return recoverableFrom(this.#options.file.state)
  }

  /** The first damaged sequence above the base that is known of; promotion stops below it. */
  get firstDamagedSeq(): number | undefined {
    return damageWithin(this.#options.journal.damage.all(), this.baseSeq, Infinity)
  }

  /** Bytes of the segments that hold (baseSeq, targetSeq], about. */
  bytesUpTo(targetSeq: number): number {
    return this.#segments(targetSeq).reduce((sum, one) => sum + one.framesEndBytes, 0)
  }

  /** Bytes of the segments that hold what came from `fromSeq` on, about. */
  bytesFrom(fromSeq: number): number {
    return this.#options.journal.segments.reduce((sum, one) => (one.lastSeq >= fromSeq ? sum + one.fileBytes : sum), 0)
  }

  /** The last sequence of the oldest segments that hold `wantedBytes` together: with the base there they are gone. Undefined if none can go. */
  seqThatFrees(wantedBytes: number): number | undefined {
    let freedBytes = 0
    let lastSeq: number | undefined
    for (const info of this.#options.journal.segments.slice(0, -1)) {
      if (freedBytes >= wantedBytes || !(info.sealed || info.damaged)) break
      freedBytes += info.fileBytes
      lastSeq = info.lastSeq
    }
    return lastSeq
  }

  /** The last sequence within the first `lengthBytes` of what follows the base: bounds one step of a long promotion. */
  seqWithin(lengthBytes: number): number {
    let bytes = 0
    for (const info of this.#segments(Infinity)) {
      bytes += info.framesEndBytes
      if (bytes > lengthBytes) return info.lastSeq
    }
    return Infinity
  }

  /**
   * Reads all that a promotion to `targetSeq` would need, before anything is given up for it.
   * @throws CdpError JOURNAL_DAMAGED, NOT_FOUND if the journal does not reach it, ABORTED, CLOSED
   */
  check(targetSeq: number, options: PromoteOptions = {}): Promise<void> {
    return this.#alone(options.signal, async (signal) => {
      if (targetSeq <= this.baseSeq) return
      const job = this.#job(targetSeq)
      // The index of a segment that the target cuts is made of all its frames, those below the base too.
      const cutFirstSeq = job.segments.at(-1)?.firstSeq ?? Infinity
      await readThrough({ ...job, baseSeq: Math.min(job.baseSeq, cutFirstSeq - 1) }, options.pace, signal)
      await using files = new FilePool(OPEN_FILES)
      if (this.#passedBy(targetSeq).length > 0) await this.#mustNotReach(targetSeq, await this.#openView(targetSeq, files), files)
    })
  }

  /**
   * Moves the base up to the state after `targetSeq`. The caller has seen to it that nothing below is pinned or opened from now on. A
   * promotion that was interrupted is finished by asking for the same target, or a later one. Nothing happens if the base is there already.
   * @throws CdpError CONFLICT for a target below a promotion begun, JOURNAL_DAMAGED, NOT_FOUND, ABORTED, CLOSED; Node's error of a full or
   * failing disk. The base is where it was then, and the same call does all of it again.
   */
  promote(targetSeq: number, options: PromoteOptions = {}): Promise<void> {
    return this.#alone(options.signal, (signal) => this.#promote(targetSeq, options, signal))
  }

  /**
   * Compares a part of a mirror disk with its checksums, between two promotions.
   * @returns undefined while the mirror is between two states: a promotion was interrupted, or there is no base yet
   * @throws CdpError CLOSED, ABORTED; Node's error
   */
  checkMirror(disk: number, fromBytes: number, maxBytes: number, signal: AbortSignal): Promise<CheckedMirror | undefined> {
    return this.#alone(signal, async () => {
      const { file, directory, damage } = this.#options
      if (!file.state.baseComplete || file.state.promotingToSeq !== undefined) return undefined
      const entry = file.state.disks.find((one) => one.disk === disk)
      if (entry === undefined) return { nextBytes: undefined, readBytes: 0, bad: [] }
      await using files = new FilePool(1)
      return await checkMirror(directory, entry, files, fromBytes, maxBytes, (offsetBytes) => damage.mirror.some((one) => one.disk === disk && one.offsetBytes <= offsetBytes && offsetBytes < one.offsetBytes + one.lengthBytes))
    })
  }

  /** Removes what the mirror has: oldest segments, and index runs that are about nothing else. @returns bytes freed */
  trim(): Promise<number> {
    return this.#alone(undefined, () => this.#trim())
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#closing.abort(new CdpError('CLOSED', 'the store of this VM is closed'))
    await this.#running
  }

  /** One thing at a time. */
  #alone<T>(signal: AbortSignal | undefined, work: (signal: AbortSignal) => Promise<T>): Promise<T> {
    const both = signal === undefined ? this.#closing.signal : AbortSignal.any([signal, this.#closing.signal])
    const done = this.#running.then(() => {
      throwIfEnded(both)
      return work(both)
    })
    this.#running = done.catch(() => undefined)
    return done
  }

  async #promote(targetSeq: number, options: PromoteOptions, signal: AbortSignal): Promise<void> {
    const { file, mirrors, vm, log, damage } = this.#options
    const { baseComplete, baseSeq, disks, promotingToSeq } = file.state
    if (!baseComplete) throw new CdpError('CONFLICT', `the initial sync of ${vm} has not ended yet`, { retry: true })
    if (targetSeq <= baseSeq) return
    if (promotingToSeq !== undefined && targetSeq < promotingToSeq) {
      throw new CdpError('CONFLICT', `a promotion of ${vm} to a later record has begun`, { context: { targetSeq, promotingToSeq } })
    }
    const job = this.#job(targetSeq)
    await using files = new FilePool(OPEN_FILES)
    const view = await this.#openView(targetSeq, files)
    await this.#mustNotReach(targetSeq, view, files)
    // Before the first byte: from here on the mirror is neither the old state nor the new one.
    if (promotingToSeq !== targetSeq) await file.update((state) => ({ ...state, promotingToSeq: targetSeq }))
    await using target = new PromotionTarget(mirrors, disks)
    let doneBytes = 0
    const pace = async (bytes: number): Promise<void> => {
      doneBytes += bytes
      options.onProgress?.({ doneBytes, totalBytes: job.totalBytes })
      await options.pace?.(bytes, signal)
    }
    await promoteRecords({ ...job, view, files, target, pace, signal, ...(options.batchBytes === undefined ? {} : { batchBytes: options.batchBytes }) })
    await target.datasync()
    await syncDirectory(mirrors.directory)
    await file.update((state) => ({ ...state, baseSeq: targetSeq, promotingToSeq: undefined }))
    damage.baseMoved(targetSeq)
    log.info('the base of a VM moved up', { vm, fromSeq: baseSeq, toSeq: targetSeq, readBytes: doneBytes, writtenBytes: target.writtenBytes })
  }

  /** Damage on the way to a target that was written again before it. */
  #passedBy(targetSeq: number): Damage[] {
    return this.#options.journal.damage.all().filter(({ lastSeq, healedFromSeq }) => lastSeq > this.baseSeq && healedFromSeq !== undefined && healedFromSeq <= targetSeq)
  }

  /** What is passed over is really not needed: asked again, of the index as of the target. @throws CdpError JOURNAL_DAMAGED */
  async #mustNotReach(targetSeq: number, view: IndexView, files: FilePool): Promise<void> {
    for (const damage of this.#passedBy(targetSeq)) {
      const info = this.#options.journal.segments.find(({ segmentNumber }) => segmentNumber === damage.segment)
      const extents = info && (await damagedExtents(files, info.path, damage))
      if (extents !== undefined && !(await isReached(view, damage, extents))) continue
      this.#options.damage.heal(damage, undefined)
      throw new CdpError('JOURNAL_DAMAGED', `the state at ${targetSeq} needs damaged records from ${damage.firstSeq} on`, { context: { firstSeq: damage.firstSeq, targetSeq } })
    }
  }

  async #trim(): Promise<number> {
    const { journal, directory, vm, log, damage, onRemoved } = this.#options
    let freedBytes = 0
    let segments = 0
    for (let oldest = journal.takeOldest(this.baseSeq); oldest !== undefined; oldest = journal.takeOldest(this.baseSeq)) {
      // One by one and oldest first, each durable: a crash never leaves a hole among the segments.
      await rm(oldest.path, { force: true })
      await syncDirectory(join(directory, 'journal'))
      await onRemoved(oldest.path)
      freedBytes += oldest.fileBytes
      segments++
    }
    const first = journal.segments.at(0)
    if (first !== undefined && (segments > 0 || !this.#runsLookedAt)) await removeRunsBelow(directory, first.segmentNumber)
    this.#runsLookedAt = true
    if (first !== undefined) damage.segmentsGone(first.segmentNumber)
    if (segments > 0) log.info('segments went into the mirror', { vm, segments, freedBytes, firstSegment: first?.segmentNumber })
    return freedBytes
  }

  #openView(targetSeq: number, files: FilePool): Promise<IndexView> {
    return IndexView.open({ vmDirectory: this.#options.directory, seq: targetSeq, files, cache: new PageCache(PAGE_CACHE_BYTES) })
  }

  #segments(targetSeq: number): { segmentNumber: number; path: string; firstSeq: number; lastSeq: number; framesEndBytes: number }[] {
    const { baseSeq } = this
    return this.#options.journal.segments
      .filter(({ firstSeq, lastSeq }) => lastSeq > baseSeq && firstSeq <= targetSeq && lastSeq >= firstSeq)
      .map(({ segmentNumber, path, firstSeq, lastSeq, framesEndBytes }) => ({ segmentNumber, path, firstSeq, lastSeq, framesEndBytes }))
  }

  /** @throws CdpError JOURNAL_DAMAGED if damage is known on the way, or a part is missing */
  #job(targetSeq: number): PromotionJob {
    const { baseSeq } = this
    const segments = this.#segments(targetSeq)
    const damaged = damageWithin(this.#options.journal.damage.all(), baseSeq, targetSeq)
    if (damaged !== undefined) throw new CdpError('JOURNAL_DAMAGED', `the journal of ${this.#options.vm} is damaged at sequence ${damaged}`, { context: { firstSeq: damaged } })
    return { baseSeq, targetSeq, segments, damage: this.#options.journal.damage, totalBytes: segments.reduce((sum, one) => sum + one.framesEndBytes, 0) }
  }
}

const throwIfEnded = (signal: AbortSignal): void => {
  if (signal.aborted) throw toCdpError(signal.reason, 'ABORTED')
}
