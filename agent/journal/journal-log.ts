import { constants } from 'node:fs'
import { mkdir, open, rm } from 'node:fs/promises'
import type { FileHandle } from 'node:fs/promises'
import { join } from 'node:path'
import { errorMessage } from '../../core/errors/index.ts'
import { writeAll } from '../../core/files/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { encodeSegmentHeader, SEGMENT_HEADER_BYTES, segmentFileName } from '../index/index.ts'
import { encodeDurableHint, HINT_BYTES, parseDurableHint } from './durable-hint.ts'
import { JournalOpening } from './open-journal.ts'
import type { OpenedJournal } from './open-journal.ts'
import { NO_DIGEST } from './segment-ends.ts'
import type { DamageList, OpenReport, SegmentInfo } from './segment-info.ts'
import type { SegmentSealer } from './segment-sealer.ts'
import { syncDirectory } from './vm-state.ts'

export type Clock = { nowUnixMs(): number }
export type SegmentLimits = { segmentBytes: number; segmentRecords: number }
export const SEGMENT_LIMITS: SegmentLimits = { segmentBytes: 64 * 1024 * 1024, segmentRecords: 262_144 }

/** Frames that become durable together. */
export type AppendBatch = { buffers: Buffer[]; lengthBytes: number; recordCount: number; lastSeq: number; firstAtUnixMs: number; lastAtUnixMs: number }

export type JournalLogOptions = { directory: string; vm: string; log: Logger; clock: Clock; limits: SegmentLimits; sealer: SegmentSealer }

/** The segments of one VM on disk: the last one is appended to, closed ones are sealed in the background, one after the other. */
export class JournalLog implements AsyncDisposable {
  readonly #options: JournalLogOptions
  readonly #journalDirectory: string
  readonly segments: SegmentInfo[]
  readonly damage: DamageList
  readonly report: OpenReport
  /** Called when a segment was sealed. */
  onSealed: ((segment: SegmentInfo) => void) | undefined
  #durableSeq: number
  #active: { info: SegmentInfo; handle: FileHandle } | undefined
  readonly #hintHandle: FileHandle
  readonly #hint = Buffer.alloc(HINT_BYTES)
  #sealing: Promise<void> | undefined
  #closed = false

  private constructor(options: JournalLogOptions, opened: OpenedJournal, active: { info: SegmentInfo; handle: FileHandle } | undefined, hintHandle: FileHandle) {
    this.#options = options
    this.#journalDirectory = join(options.directory, 'journal')
    this.segments = opened.segments
    this.damage = opened.damage
    this.report = opened.report
    this.#durableSeq = opened.durableSeq
    this.#active = active
    this.#hintHandle = hintHandle
  }

  /** @param baseSeq what the mirror holds */
  static async open(options: JournalLogOptions, baseSeq: number): Promise<{ log: JournalLog; diskMarks: OpenedJournal['diskMarks'] }> {
    const journalDirectory = join(options.directory, 'journal')
    await mkdir(journalDirectory, { recursive: true })
    await using held = new AsyncDisposableStack()
    const hintHandle = held.use(await open(join(options.directory, 'durable.hint'), constants.O_RDWR | constants.O_CREAT, 0o640))
    const hintBytes = Buffer.alloc(HINT_BYTES)
    await hintHandle.read(hintBytes, 0, HINT_BYTES, 0)
    const opened = await new JournalOpening(journalDirectory, options.vm, parseDurableHint(hintBytes)).run(baseSeq)
    const last = opened.segments.at(-1)
    const active = opened.lastIsOpen && last !== undefined ? { info: last, handle: held.use(await open(last.path, 'r+')) } : undefined
    // What a crash left in the page cache only is made durable before it is promised.
    await active?.handle.datasync()
    held.move()
    const log = new JournalLog(options, opened, active, hintHandle)
    log.#sealNext()
    return { log, diskMarks: opened.diskMarks }
  }

  get durableSeq(): number {
    return this.#durableSeq
  }

  /** Bytes of all segments on disk. */
  get bytes(): number {
    return this.segments.reduce((sum, one) => sum + one.fileBytes, 0)
  }

  /** The initial sync ended with `baseSeq`: the journal begins with the next sequence. */
  begin(baseSeq: number): void {
    this.#durableSeq = Math.max(this.#durableSeq, baseSeq)
  }

  /** True if that much more may stand in the active segment. A single frame always may stand in an empty one: ask `isEmpty`. */
  hasRoom(lengthBytes: number, recordCount: number): boolean {
    const { segmentBytes, segmentRecords } = this.#options.limits
    if (this.#active === undefined) return false
    const { framesEndBytes, recordCount: held } = this.#active.info
    return framesEndBytes + lengthBytes <= segmentBytes && held + recordCount <= segmentRecords
  }

  /** True if there is an active segment and it has no frame yet. */
  get isEmpty(): boolean {
    return this.#active?.info.recordCount === 0
  }

  /** Closes the active segment and begins the next one with `firstSeq`; the closed one is sealed in the background. */
  async roll(firstSeq: number): Promise<void> {
    const before = this.segments.at(-1)
    const segmentNumber = before === undefined ? 0 : before.segmentNumber + 1
    const previousDigest = before?.digest ?? NO_DIGEST
    const createdAtUnixMs = this.#options.clock.nowUnixMs()
    const path = join(this.#journalDirectory, segmentFileName(firstSeq))
    const handle = await open(path, 'wx+', 0o640)
    try {
      const header = encodeSegmentHeader({ firstSeq, createdAtUnixMs, segmentNumber, previousDigest, vm: this.#options.vm })
      await writeAll(handle, [header], SEGMENT_HEADER_BYTES, 0)
      await handle.datasync()
      await syncDirectory(this.#journalDirectory)
    } catch (error) {
      await handle.close()
      await rm(path, { force: true })
      throw error
    }
    const info: SegmentInfo = {
      segmentNumber, path, firstSeq, createdAtUnixMs, lastSeq: firstSeq - 1, recordCount: 0, firstAtUnixMs: 0, lastAtUnixMs: 0,
      framesEndBytes: SEGMENT_HEADER_BYTES, runBytes: 0, fileBytes: SEGMENT_HEADER_BYTES, sealed: false, damaged: false, digest: undefined, previousDigest,
    }
    const closed = this.#active
    this.#active = { info, handle }
    this.segments.push(info)
    await closed?.handle.close()
    this.#sealNext()
  }

  /** Appends and makes durable. After an error nothing of the batch counts: `cutBack`, or give the journal up. */
  async append(batch: AppendBatch): Promise<void> {
    if (this.#active === undefined) throw new Error('append without a segment')
    const { info, handle } = this.#active
    await writeAll(handle, batch.buffers, batch.lengthBytes, info.framesEndBytes)
    await handle.datasync()
    if (info.recordCount === 0) info.firstAtUnixMs = batch.firstAtUnixMs
    info.lastAtUnixMs = batch.lastAtUnixMs
    info.framesEndBytes += batch.lengthBytes
    info.fileBytes = info.framesEndBytes
    info.recordCount += batch.recordCount
    info.lastSeq = batch.lastSeq
    this.#durableSeq = batch.lastSeq
  }

  /** Notes how far the journal is durable (see durable-hint.ts). */
  async writeHint(): Promise<void> {
    if (this.#active === undefined) return
    const { info } = this.#active
    encodeDurableHint(this.#hint, this.#durableSeq, info.segmentNumber, info.framesEndBytes)
    await this.#hintHandle.write(this.#hint, 0, HINT_BYTES, 0)
  }

  /** Cuts what a failed append left behind the last durable frame. */
  async cutBack(): Promise<void> {
    if (this.#active === undefined) return
    await this.#active.handle.truncate(this.#active.info.framesEndBytes)
    await this.#active.handle.datasync()
  }

  /**
   * The oldest segment, if all of it is at or below `baseSeq` and nobody needs it to append or seal: taken off the list, its file is the
   * caller's to remove. The newest one always stays: the numbers of segments and their chain go on from it.
   */
  takeOldest(baseSeq: number): SegmentInfo | undefined {
    const oldest = this.segments.at(0)
    if (oldest === undefined || this.segments.length < 2 || oldest.lastSeq > baseSeq || !(oldest.sealed || oldest.damaged)) return undefined
    return this.segments.shift()
  }

  /** Header, run or trailer of a sealed segment are damaged and its frames are whole: they are made again, in the background. */
  sealAgain(info: SegmentInfo): void {
    if (!info.sealed || info.digest === undefined || !this.segments.includes(info)) return
    info.sealed = false
    this.#sealNext()
  }

  /** Seals what is closed and could not be sealed before. */
  resumeSealing(): void {
    this.#sealNext()
  }

  /** Resolves when no sealing is under way. */
  async sealingIdle(): Promise<void> {
    while (this.#sealing !== undefined) await this.#sealing
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#closed) return
    this.#closed = true
    await this.sealingIdle()
    await this.#active?.handle.close()
    await this.#hintHandle.close()
  }

  #sealNext(): void {
    if (this.#closed || this.#sealing !== undefined) return
    const index = this.segments.findIndex((one, at) => !one.sealed && !one.damaged && at < this.segments.length - 1)
    if (index < 0) return
    const info = this.segments[index]
    // One that is sealed again keeps the digest that its successor names.
    const previousDigest = index === 0 || info.digest !== undefined ? info.previousDigest : (this.segments[index - 1].digest ?? NO_DIGEST)
    this.#sealing = this.#seal(info, previousDigest).then((again) => {
      this.#sealing = undefined
      if (again) this.#sealNext()
    })
  }

  async #seal(info: SegmentInfo, previousDigest: Buffer): Promise<boolean> {
    const { path, segmentNumber, firstSeq, lastSeq, createdAtUnixMs, framesEndBytes } = info
    const { vm } = this.#options
    const fields = { vm, segment: segmentNumber }
    try {
      const result = await this.#options.sealer.seal({ path, segmentNumber, firstSeq, lastSeq, createdAtUnixMs, vm, framesEndBytes, previousDigest })
      if (result.is === 'damaged') {
        info.damaged = true
        for (const bad of result.bad) this.damage.add({ segment: segmentNumber, firstSeq: bad.firstSeq, lastSeq: bad.lastSeq ?? lastSeq, what: bad.what })
        this.#options.log.error('a segment is damaged and stays unsealed', { ...fields, firstSeq: result.bad[0].firstSeq, what: result.bad[0].what })
        return true
      }
      const { sealed } = result
      info.digest = Buffer.from(sealed.digest)
      info.previousDigest = previousDigest
      info.runBytes = sealed.runBytes
      info.fileBytes = sealed.fileBytes
      info.sealed = true
      this.onSealed?.(info)
      return true
    } catch (error) {
      this.#options.log.warn('a segment could not be sealed; it is tried again with the next one', { ...fields, error: errorMessage(error) })
      return false
    }
  }
}
