import { CdpError, errorCode, toCdpError } from '../../core/errors/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import { SECTOR_BYTES } from '../../core/record/index.ts'
import { IndexView } from '../index/index.ts'
import { readDamageFile, recoverableFrom } from '../journal/index.ts'
import type { MirrorDamage } from '../journal/index.ts'
import type { FilePool, IndexDamage, PageCache, Piece } from '../index/index.ts'
import { openReadableMirror, splitByMap } from '../mirror/index.ts'
import type { DataMap, ReadableMirror } from '../mirror/index.ts'
import { leftHistory, readBaseState } from './base-state.ts'
import type { FrameCache, FramePlace } from './frame-cache.ts'
import type { ReadGate } from './read-gate.ts'

/** Caches and limits that all points of a process share. */
export type PointResources = { pages: PageCache; frames: FrameCache; gate: ReadGate; files: FilePool }

export type RecoveryPointOptions = PointResources & {
  /** The VM's directory: vm.json, journal/, runs/, mirror/. */
  vmDirectory: string
  /** The point is the state after this record. */
  seq: number
  /** Disks and their sizes as of `seq`. Default: those of vm.json. */
  disks?: readonly DiskEntry[]
  /** A part of the index that had to be bypassed. */
  onIndexDamage?: (damage: IndexDamage) => void
  /** A part of the journal that is damaged; reads that need it are refused with the same error. */
  onJournalDamage?: (error: CdpError) => void
}

/** Bytes with the same answer of a block status: `data`, or a hole that reads as zeroes. */
export type StatusExtent = { lengthBytes: number; isHole: boolean }

const ZEROES = Buffer.alloc(1024 * 1024)
const LOADS_AT_ONCE = 4
/** Up to so many pieces are sent as they are; more are copied into one buffer. */
const FEW_PIECES = 8
const READ_AHEAD_BYTES = 4 * 1024 * 1024
const STATUS_STEP_BYTES = 64 * 1024 * 1024
const STATUS_MAX_EXTENTS = 512
const STATUS_MAX_STEPS = 64
/** A piece that is a smaller part of its frame than this is copied, so that a reply never keeps many frames alive. */
const KEEP_VIEW_PART = 4

/**
 * The disks of one VM as they were after record `seq`, for reading: mirror below, journal above. It works on the VM's files
 * and keeps working while the journal grows, is sealed and merged, and while the base moves up to `seq` (hold a pin).
 */
export class RecoveryPoint {
  readonly vm: string
  readonly seq: number
  readonly disks: readonly DiskEntry[]
  readonly #options: RecoveryPointOptions
  readonly #view: IndexView
  #damagedBase: readonly MirrorDamage[]
  readonly #fileIds = new Map<number, number>()
  readonly #mirrors = new Map<number, Promise<ReadableMirror>>()
  readonly #maps = new Map<number, { floorSegment: number; map: Promise<DataMap> }>()
  readonly #lastEnds = new Map<number, number>()
  readonly #prefetching = new Set<number>()
  readonly #ending = new AbortController()

  private constructor(options: RecoveryPointOptions, vm: string, disks: readonly DiskEntry[], view: IndexView, damagedBase: readonly MirrorDamage[]) {
    this.#damagedBase = damagedBase
    this.#options = options
    this.vm = vm
    this.seq = options.seq
    this.disks = disks
    this.#view = view
  }

  /**
   * @throws CdpError NOT_FOUND if the history does not hold `seq` (any more, or yet), CONFLICT while the initial sync runs,
   * JOURNAL_DAMAGED if frames that the index is made of are damaged
   */
  static async open(options: RecoveryPointOptions): Promise<RecoveryPoint> {
    const base = await readBaseState(options.vmDirectory)
    if (!base.baseComplete) throw new CdpError('CONFLICT', `the initial sync of ${base.vm} has not ended yet`, { retry: true, hint: 'wait for its first checkpoint' })
    if (options.seq < recoverableFrom(base)) throw leftHistory(base.vm, options.seq, recoverableFrom(base))
    const { vmDirectory, seq, files, pages: cache, onIndexDamage: onDamage } = options
    const view = await IndexView.open({ vmDirectory, seq, files, cache, onDamage }).catch((error: unknown) => {
      if (errorCode(error) === 'JOURNAL_DAMAGED') options.onJournalDamage?.(toCdpError(error))
      throw error
    })
    if (!view.hasJournal && base.baseSeq < seq) throw new CdpError('NOT_FOUND', `the journal of ${base.vm} does not hold sequence ${seq}`)
    const { mirror } = await readDamageFile(vmDirectory)
    return new RecoveryPoint(options, base.vm, options.disks ?? base.disks, view, mirror)
  }

  /**
   * `lengthBytes` of a disk from `offsetBytes` on, in any number of pieces; the pieces must not be written to.
   * @throws CdpError BAD_INPUT outside the disk, JOURNAL_DAMAGED if a frame it needs is damaged, CLOSED
   */
  async read(disk: number, offsetBytes: number, lengthBytes: number): Promise<Uint8Array[]> {
    this.#check(disk, offsetBytes, lengthBytes)
    const start = offsetBytes - (offsetBytes % SECTOR_BYTES)
    const end = Math.ceil((offsetBytes + lengthBytes) / SECTOR_BYTES) * SECTOR_BYTES
    const parts = await this.#options.gate.run(() => this.#readSectors(disk, start, end - start))
    this.#readAhead(disk, offsetBytes, offsetBytes + lengthBytes)
    if (start === offsetBytes && end === offsetBytes + lengthBytes) return parts
    return [Buffer.concat(parts).subarray(offsetBytes - start, offsetBytes - start + lengthBytes)]
  }

  /** What is known about holes from `offsetBytes` on; may describe less than was asked. */
  async blockStatus(disk: number, offsetBytes: number, lengthBytes: number): Promise<StatusExtent[]> {
    this.#check(disk, offsetBytes, lengthBytes)
    const start = offsetBytes - (offsetBytes % SECTOR_BYTES)
    const end = Math.ceil((offsetBytes + lengthBytes) / SECTOR_BYTES) * SECTOR_BYTES
    const extents: StatusExtent[] = []
    const add = (bytes: number, isHole: boolean): void => {
      const last = extents.at(-1)
      if (last?.isHole === isHole) last.lengthBytes += bytes
      else extents.push({ lengthBytes: bytes, isHole })
    }
    let position = start
    for (let step = 0; step < STATUS_MAX_STEPS && position < end && extents.length < STATUS_MAX_EXTENTS; step++) {
      const length = Math.min(STATUS_STEP_BYTES, end - position)
      const pieces = await this.#options.gate.run(() => this.#view.resolve(disk, position, length))
      const map = pieces.some((piece) => piece.from === 'base') ? await this.#dataMap(disk) : undefined
      for (const piece of pieces) {
        if (piece.from === 'base') splitByMap(map, piece.offsetBytes, piece.offsetBytes + piece.lengthBytes, add)
        else add(piece.lengthBytes, piece.from === 'zero')
      }
      position += length
    }
    extents[0].lengthBytes -= offsetBytes - start
    return extents
  }

  /** Ends the point: what is read from now on fails with CLOSED. Idempotent. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#ending.abort()
    this.#maps.clear()
    const mirrors = [...this.#mirrors.values()]
    this.#mirrors.clear()
    for (const opened of await Promise.allSettled(mirrors)) if (opened.status === 'fulfilled') await opened.value[Symbol.asyncDispose]()
  }

  #check(disk: number, offsetBytes: number, lengthBytes: number): void {
    if (this.#ending.signal.aborted) throw new CdpError('CLOSED', 'this recovery point was closed')
    const entry = this.disks.find((one) => one.disk === disk)
    if (entry === undefined) throw new CdpError('BAD_INPUT', 'no such disk in this recovery point', { context: { disk } })
    if (offsetBytes < 0 || lengthBytes <= 0 || offsetBytes + lengthBytes > entry.sizeBytes) {
      throw new CdpError('BAD_INPUT', 'range outside the disk', { context: { offsetBytes, lengthBytes, sizeBytes: entry.sizeBytes } })
    }
  }

  async #readSectors(disk: number, offsetBytes: number, lengthBytes: number): Promise<Uint8Array[]> {
    for (let attempt = 0; ; attempt++) {
      try {
        return await this.#assemble(disk, await this.#view.resolve(disk, offsetBytes, lengthBytes))
      } catch (error) {
        // A segment that went into the mirror between the look-up and the read: look again.
        if (errorCode(error) === 'ENOENT' && attempt < 8 && (await this.#view.refreshFloor())) continue
        if (errorCode(error) === 'JOURNAL_DAMAGED') this.#options.onJournalDamage?.(toCdpError(error))
        throw errorCode(error) === 'ENOENT' ? new CdpError('JOURNAL_DAMAGED', 'a file of the replica is missing', { cause: error }) : error
      }
    }
  }

  /** What the mirror holds of a piece is known to be damaged; the list is read again first, since the piece may be whole by now. */
  async #mustBeWhole(disk: number, pieces: readonly Piece[]): Promise<void> {
    const hits = (): boolean =>
      pieces.some((piece) => (piece.from === 'base' || piece.from === 'promoted') && this.#damagedBase.some((one) =>
        one.disk === disk && one.offsetBytes < piece.offsetBytes + piece.lengthBytes && piece.offsetBytes < one.offsetBytes + one.lengthBytes))
    if (!hits()) return
    this.#damagedBase = (await readDamageFile(this.#options.vmDirectory)).mirror
    if (hits()) throw new CdpError('JOURNAL_DAMAGED', 'a part of the mirror is damaged', { hint: 'See "pvecdp scrub show"; a sync writes it again.', context: { disk } })
  }

  async #assemble(disk: number, pieces: readonly Piece[]): Promise<Uint8Array[]> {
    if (this.#damagedBase.length > 0) await this.#mustBeWhole(disk, pieces)
    if (pieces.length > FEW_PIECES) return [await this.#assembleOne(disk, pieces)]
    const parts: Uint8Array[][] = pieces.map(() => [])
    await allAtOnce(pieces.map((piece, at) => async () => {
      if (piece.from === 'zero') parts[at] = zeroes(piece.lengthBytes)
      else if (piece.from === 'data') parts[at] = [compact(await this.#dataOf(piece))]
      else parts[at] = [await this.#readBase(disk, piece.offsetBytes, Buffer.allocUnsafeSlow(piece.lengthBytes))]
    }), LOADS_AT_ONCE)
    return parts.flat()
  }

  /** Many small pieces go into one buffer: the mirror is read in one go below them where that is not much more than is needed. */
  async #assembleOne(disk: number, pieces: readonly Piece[]): Promise<Buffer> {
    const first = pieces[0].offsetBytes
    const end = pieces[pieces.length - 1].offsetBytes + pieces[pieces.length - 1].lengthBytes
    const whole = Buffer.allocUnsafeSlow(end - first)
    const inBase = pieces.filter((piece) => piece.from === 'base' || piece.from === 'promoted')
    const baseBytes = inBase.reduce((sum, piece) => sum + piece.lengthBytes, 0)
    if (inBase.length > 1 && baseBytes * 4 > whole.length) await this.#readBase(disk, first, whole)
    else await allAtOnce(inBase.map((piece) => async () => void (await this.#readBase(disk, piece.offsetBytes, whole.subarray(piece.offsetBytes - first, piece.offsetBytes - first + piece.lengthBytes)))), LOADS_AT_ONCE)
    const byFrame = new Map<number, Piece[]>()
    for (const piece of pieces) {
      const at = piece.offsetBytes - first
      if (piece.from === 'zero') whole.fill(0, at, at + piece.lengthBytes)
      if (piece.from !== 'data') continue
      const key = this.#frameKey(piece)
      const payload = this.#options.frames.get(key)
      if (payload !== undefined && piece.payloadOffset + piece.lengthBytes <= payload.length) payload.copy(whole, at, piece.payloadOffset, piece.payloadOffset + piece.lengthBytes)
      else byFrame.set(key, [...(byFrame.get(key) ?? []), piece])
    }
    await allAtOnce(Array.from(byFrame.values(), (waiting) => async () => {
      for (const piece of waiting) (await this.#dataOf(piece)).copy(whole, piece.offsetBytes - first)
    }), LOADS_AT_ONCE)
    return whole
  }

  #dataOf(piece: Piece): Promise<Buffer> {
    const { frames, files } = this.#options
    return frames.loadPart(this.#frameKey(piece), this.#framePlace(piece), files, piece.payloadOffset, piece.lengthBytes)
  }

  async #readBase(disk: number, offsetBytes: number, buffer: Buffer): Promise<Buffer> {
    await (await this.#mirror(disk)).read(offsetBytes, buffer)
    return buffer
  }

  #mirror(disk: number): Promise<ReadableMirror> {
    let mirror = this.#mirrors.get(disk)
    if (mirror === undefined) {
      mirror = openReadableMirror(this.#options.vmDirectory, disk, this.#options.files)
      this.#mirrors.set(disk, mirror)
    }
    return mirror
  }

  /** Loads the frames behind a sequential read, so that the next one finds them. */
  #readAhead(disk: number, startBytes: number, endBytes: number): void {
    const isSequential = this.#lastEnds.get(disk) === startBytes
    this.#lastEnds.set(disk, endBytes)
    const sizeBytes = this.disks.find((one) => one.disk === disk)?.sizeBytes ?? 0
    const from = Math.ceil(endBytes / SECTOR_BYTES) * SECTOR_BYTES
    const lengthBytes = Math.min(READ_AHEAD_BYTES, sizeBytes - from)
    if (!isSequential || lengthBytes < SECTOR_BYTES || this.#prefetching.has(disk) || this.#options.frames.maxBytes < READ_AHEAD_BYTES * 4) return
    this.#prefetching.add(disk)
    // Whatever goes wrong here goes wrong again, and is reported, in the read that needs it.
    void this.#prefetch(disk, from, lengthBytes - (lengthBytes % SECTOR_BYTES)).catch(() => undefined).finally(() => this.#prefetching.delete(disk))
  }

  async #prefetch(disk: number, offsetBytes: number, lengthBytes: number): Promise<void> {
    const { frames, files, gate } = this.#options
    const pieces = await this.#view.resolve(disk, offsetBytes, lengthBytes)
    let budgetBytes = READ_AHEAD_BYTES * 2
    let lastKey = -1
    for (const piece of pieces) {
      if (piece.from !== 'data' || budgetBytes <= 0 || this.#ending.signal.aborted) continue
      const key = this.#frameKey(piece)
      if (key === lastKey) continue
      lastKey = key
      if (frames.get(key) !== undefined) continue
      const payload = await gate.run(() => frames.load(key, this.#framePlace(piece), files))
      budgetBytes -= payload.length
    }
  }

  #frameKey(piece: Piece): number {
    let fileId = this.#fileIds.get(piece.segment)
    if (fileId === undefined) {
      fileId = this.#options.frames.fileId(this.#view.segment(piece.segment).path)
      this.#fileIds.set(piece.segment, fileId)
    }
    return this.#options.frames.key(fileId, piece.frameOffset)
  }

  #framePlace(piece: Piece): FramePlace {
    return { ...this.#view.segment(piece.segment), segment: piece.segment, frameOffset: piece.frameOffset }
  }

  /** Holes of the mirror; asked again when segments have gone into it since. */
  #dataMap(disk: number): Promise<DataMap> {
    const { floorSegment } = this.#view
    let known = this.#maps.get(disk)
    if (known?.floorSegment !== floorSegment) {
      known = { floorSegment, map: this.#mirror(disk).then((mirror) => mirror.dataMap(this.#ending.signal)) }
      this.#maps.set(disk, known)
    }
    return known.map
  }
}

const compact = (data: Buffer): Buffer => (data.length * KEEP_VIEW_PART < data.buffer.byteLength ? Buffer.from(data) : data)

const zeroes = (lengthBytes: number): Uint8Array[] => {
  const parts: Uint8Array[] = []
  for (let left = lengthBytes; left > 0; left -= ZEROES.length) parts.push(left < ZEROES.length ? ZEROES.subarray(0, left) : ZEROES)
  return parts
}

/** Runs all of `work`, `limit` at a time; waits for those begun even if one fails. */
const allAtOnce = async (work: readonly (() => Promise<void>)[], limit: number): Promise<void> => {
  if (work.length === 0) return
  if (work.length === 1) return work[0]()
  let next = 0
  const lane = async (): Promise<void> => {
    while (next < work.length) await work[next++]()
  }
  const results = await Promise.allSettled(Array.from({ length: Math.min(limit, work.length) }, lane))
  const failed = results.find((result) => result.status === 'rejected')
  if (failed !== undefined) throw failed.reason
}
