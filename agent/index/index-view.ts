import { stat } from 'node:fs/promises'
import { CdpError, errorCode, errorMessage } from '../../core/errors/index.ts'
import { ListSource } from './extent-source.ts'
import type { ExtentSource } from './extent-source.ts'
import { planCover } from './cover.ts'
import type { FilePool } from './file-pool.ts'
import type { PageCache } from './page-cache.ts'
import { SourceFailure, resolveRange, warm } from './resolve.ts'
import type { Piece } from './resolve.ts'
import { RunReader } from './run-reader.ts'
import { scanRecords } from './segment-scan.ts'
import { listRunFiles, listSegments, locateLeafRun } from './vm-files.ts'
import type { RunFile, SegmentList } from './vm-files.ts'

/** An index run that could not be used. What it said is taken from what it was made of; somebody should make it again. */
export type IndexDamage = { path: string; level: number; firstSegment: number; lastSegment: number; reason: string }

export type IndexViewOptions = {
  /** Directory of the VM: journal/ and runs/ in it. */
  vmDirectory: string
  /** The view shows records up to this sequence. */
  seq: number
  files: FilePool
  /** Shared by all views of a process. */
  cache: PageCache
  onDamage?: (damage: IndexDamage) => void
}

type Placed = { source: ExtentSource; level: number; firstSegment: number; lastSegment: number; path: string }

const OPEN_AT_ONCE = 16
const OPEN_ATTEMPTS = 8

/**
 * The index of one VM as of one sequence, on its files alone: merged runs where they are, leaf runs above them, and the frames of
 * the segment that `seq` cuts. It stays right while the journal grows, segments are sealed, runs merged and the oldest
 * segments taken away. What lies below a merged run is never opened.
 */
export class IndexView {
  readonly seq: number
  readonly #options: IndexViewOptions
  #segments: SegmentList
  readonly #runFiles: RunFile[]
  #beginsBefore = false
  /** Newest first. */
  #placed: Placed[] = []
  #sources: ExtentSource[] = []

  private constructor(options: IndexViewOptions, segments: SegmentList, runFiles: RunFile[]) {
    this.seq = options.seq
    this.#options = options
    this.#segments = segments
    this.#runFiles = runFiles
  }

  /**
   * @throws CdpError NOT_FOUND if the journal does not reach `seq`, JOURNAL_DAMAGED if frames that are needed for the index are damaged
   */
  static async open(options: IndexViewOptions): Promise<IndexView> {
    for (let attempt = 0; ; attempt++) {
      const [segments, runFiles] = await Promise.all([listSegments(options.vmDirectory, options.files), listRunFiles(options.vmDirectory)])
      const view = new IndexView(options, segments, runFiles)
      try {
        await view.#openAll()
        return view
      } catch (error) {
        // A segment or a run that went away between the list and the look: with a new list, the mirror is known to have it.
        if (errorCode(error) !== 'ENOENT' || attempt === OPEN_ATTEMPTS) throw error
      }
    }
  }

  /** Segments before this one are gone; the mirror has what they held. */
  get floorSegment(): number {
    return this.#segments.firstNumber
  }

  /** The journal has records up to `seq`; false if it begins behind it. */
  get hasJournal(): boolean {
    return this.#beginsBefore
  }

  get sourceCount(): number {
    return this.#sources.length
  }

  /** Path and sequences of a segment that holds data of this view. */
  segment(number: number): { path: string; firstSeq: number; lastSeq: number } {
    return { path: this.#segments.path(number), firstSeq: this.#segments.firstSeq(number), lastSeq: this.#segments.lastSeq(number) ?? Infinity }
  }

  /** Looks which of the oldest segments are gone by now; true if some are. */
  async refreshFloor(): Promise<boolean> {
    const segments = await listSegments(this.#options.vmDirectory, this.#options.files)
    const moved = segments.firstNumber > this.#segments.firstNumber
    if (moved) this.#segments = segments
    return moved
  }

  /**
   * Where the bytes of a range are; see resolveRange. Offsets and lengths are multiples of 512.
   * @throws CdpError JOURNAL_DAMAGED if a damaged run can not be made up for from the frames
   */
  async resolve(disk: number, offsetBytes: number, lengthBytes: number): Promise<Piece[]> {
    for (;;) {
      const sources = this.#sources
      const { cache } = this.#options
      const onFirstMiss = cache.capacityPages > sources.length * 8 ? (key: number): Promise<void> => warm(sources, key) : undefined
      try {
        return await resolveRange(sources, disk, offsetBytes, lengthBytes, { floorSegment: this.floorSegment, onFirstMiss })
      } catch (failure) {
        if (!(failure instanceof SourceFailure)) throw failure
        await this.#bypass(failure)
      }
    }
  }

  async #openAll(): Promise<void> {
    const segments = this.#segments
    const cut = segments.numberOf(this.seq)
    if (cut === undefined) return
    this.#beginsBefore = true
    const cutIsWhole = (segments.lastSeq(cut) ?? (await this.#sealedEnd(cut))) === this.seq
    const placed: Placed[] = []
    if (!cutIsWhole) placed.push(await this.#openFrames(cut))
    placed.push(...(await this.#openCover(segments.firstNumber, cutIsWhole ? cut : cut - 1, Infinity)))
    this.#place(placed)
  }

  /** Last sequence of the newest segment, if it is sealed. */
  async #sealedEnd(newest: number): Promise<number | undefined> {
    const path = this.#segments.path(newest)
    const place = await locateLeafRun(this.#options.files, path, (await stat(path)).size)
    if (place !== undefined && place.lastSeq < this.seq) {
      throw new CdpError('NOT_FOUND', `the journal ends with sequence ${place.lastSeq}, before ${this.seq}`, { context: { path } })
    }
    return place?.lastSeq
  }

  /** Sources for whole segments first ... last from runs below `belowLevel`, newest first. */
  async #openCover(first: number, last: number, belowLevel: number): Promise<Placed[]> {
    const cover = planCover(first, last, this.#runFiles.filter((run) => run.level < belowLevel))
    const placed: Placed[][] = []
    for (let at = 0; at < cover.length; at += OPEN_AT_ONCE) {
      placed.push(...(await Promise.all(cover.slice(at, at + OPEN_AT_ONCE).map(async (part) =>
        part.run === undefined ? [await this.#openLeaf(part.firstSegment)] : this.#openRun(part.run)))))
    }
    return placed.flat()
  }

  async #openRun(run: RunFile): Promise<Placed[]> {
    const { files, cache } = this.#options
    try {
      const runBytes = (await stat(run.path)).size
      const source = await RunReader.open({ path: run.path, offsetBytes: 0, runBytes }, files, cache)
      if (source.firstSegment > run.firstSegment || source.lastSegment !== run.lastSegment) throw new CdpError('FORMAT', 'index run covers other segments than its name says')
      return [{ source, ...run }]
    } catch (error) {
      if (errorCode(error) === 'ENOENT') throw error
      this.#reportDamage(run, error)
      const { firstNumber } = this.#segments
      return this.#openCover(Math.max(run.firstSegment, firstNumber), run.lastSegment, run.level)
    }
  }

  async #openLeaf(number: number): Promise<Placed> {
    const { files, cache } = this.#options
    const path = this.#segments.path(number)
    const place = await locateLeafRun(files, path, (await stat(path)).size)
    if (place === undefined) return this.#openFrames(number)
    const around = { level: 0, firstSegment: number, lastSegment: number, path }
    try {
      return { source: await RunReader.open(place, files, cache), ...around }
    } catch (error) {
      if (errorCode(error) === 'ENOENT') throw error
      this.#reportDamage(around, error)
      return this.#openFrames(number)
    }
  }

  async #openFrames(number: number): Promise<Placed> {
    const { path, firstSeq, lastSeq } = this.segment(number)
    const records = await scanRecords(this.#options.files, { path, segment: number, firstSeq, untilSeq: Math.min(lastSeq, this.seq) })
    return { source: new ListSource(records.extents().trim()), level: -1, firstSegment: number, lastSegment: number, path }
  }

  async #bypass(failure: SourceFailure): Promise<void> {
    const broken = this.#placed.find((one) => one.source === failure.source)
    // Another look-up was faster.
    if (broken === undefined) return
    const gone = errorCode(failure.cause) === 'ENOENT'
    if (gone) await this.refreshFloor()
    const first = Math.max(broken.firstSegment, this.floorSegment)
    if (!gone) this.#reportDamage(broken, failure.cause)
    await this.#options.files.forget(broken.path)
    let instead: Placed[] = []
    if (broken.level > 0) instead = await this.#openCover(first, broken.lastSegment, broken.level)
    else if (broken.lastSegment >= first) {
      if (gone) throw new CdpError('JOURNAL_DAMAGED', `segment ${broken.lastSegment} is missing`, { cause: failure.cause, context: { path: broken.path } })
      instead = [await this.#openFrames(broken.lastSegment)]
    }
    this.#place(this.#placed.flatMap((one) => (one === broken ? instead : [one])))
  }

  #place(placed: Placed[]): void {
    this.#placed = placed
    this.#sources = placed.map((one) => one.source)
  }

  #reportDamage(run: { path: string; level: number; firstSegment: number; lastSegment: number }, error: unknown): void {
    const { path, level, firstSegment, lastSegment } = run
    this.#options.onDamage?.({ path, level, firstSegment, lastSegment, reason: errorMessage(error) })
  }
}
