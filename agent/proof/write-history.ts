import { CdpError } from '../../core/errors/index.ts'
import { KNOWLEDGE_WINDOW, MAX_WRITERS, knows } from './stamp.ts'
import type { Knowledge, StampedWrite } from './stamp.ts'

/** `ordinal`: place in the order of all submissions, from 1 on. Of two writes to one sector the higher one came later. */
export type HistoryWrite = StampedWrite & { ordinal: number }

export type WriteHistoryOptions = { runId: number; writerCount: number; /** Size of each disk's stamped region, which begins at sector 0. */ sectorsOfDisks: readonly number[] }

/**
 * What the writers of one proof did: kept by their harness while they write, asked by the checker. All writers live in one process,
 * which sees every acknowledgement: what it knows at a submission is exactly the set of writes that precede it.
 *
 * Writes that overlap are never under way at once (`isFree`); so the writes to each sector have one order, that of submission.
 */
export class WriteHistory {
  readonly runId: number
  readonly writerCount: number
  readonly sectorsOfDisks: readonly number[]
  /** Live; copy it to keep it. */
  readonly knowledge: Knowledge
  /** Newest sequence of each writer. Live. */
  readonly submitted: Uint32Array
  readonly #ordinals: number[][]
  readonly #disks: number[] = [0]
  readonly #firstSectors: number[] = [0]
  readonly #lengths: number[] = [0]
  readonly #writers: number[] = [0]
  readonly #sequences: number[] = [0]
  readonly #busy: Uint8Array[]

  constructor({ runId, writerCount, sectorsOfDisks }: WriteHistoryOptions) {
    if (writerCount < 1 || writerCount > MAX_WRITERS) throw new CdpError('BAD_INPUT', `a proof has 1 to ${MAX_WRITERS} writers`)
    this.runId = runId
    this.writerCount = writerCount
    this.sectorsOfDisks = sectorsOfDisks
    this.knowledge = new Uint32Array(writerCount * 2)
    this.submitted = new Uint32Array(writerCount)
    this.#ordinals = Array.from({ length: writerCount }, () => [0])
    this.#busy = sectorsOfDisks.map((sectors) => new Uint8Array(sectors))
  }

  /** Writes so far. */
  get count(): number {
    return this.#disks.length - 1
  }

  /** True if nothing is under way in that range. */
  isFree(disk: number, firstSector: number, sectors: number): boolean {
    const end = firstSector + sectors
    const busy = this.#busy[disk]
    for (let sector = firstSector; sector < end; sector++) if (busy[sector] !== 0) return false
    return end <= busy.length
  }

  /** True if the writer has room for one more write under way. */
  hasRoom(writer: number): boolean {
    return this.submitted[writer] < this.knowledge[writer * 2] + KNOWLEDGE_WINDOW
  }

  /**
   * A write is about to be submitted.
   * @throws CdpError CONFLICT if it overlaps one that is under way, or the writer has too many
   */
  submit(writer: number, disk: number, firstSector: number, sectors: number): HistoryWrite {
    if (!this.isFree(disk, firstSector, sectors) || !this.hasRoom(writer)) throw new CdpError('CONFLICT', 'the order of these writes would not be defined', { context: { writer, disk, firstSector } })
    this.#busy[disk].fill(1, firstSector, firstSector + sectors)
    const sequence = ++this.submitted[writer]
    const ordinal = this.#disks.push(disk) - 1
    this.#firstSectors.push(firstSector)
    this.#lengths.push(sectors)
    this.#writers.push(writer)
    this.#sequences.push(sequence)
    this.#ordinals[writer].push(ordinal)
    return this.write(ordinal)
  }

  /** Its acknowledgement has arrived. */
  acknowledge({ writer, sequence, disk, firstSector, sectors }: StampedWrite): void {
    this.#busy[disk].fill(0, firstSector, firstSector + sectors)
    const { knowledge } = this
    let upTo = knowledge[writer * 2]
    let ahead = (knowledge[writer * 2 + 1] | (1 << (sequence - upTo - 1))) >>> 0
    while ((ahead & 1) === 1) {
      upTo++
      ahead >>>= 1
    }
    knowledge[writer * 2] = upTo
    knowledge[writer * 2 + 1] = ahead
  }

  isAcknowledged(writer: number, sequence: number): boolean {
    return knows(this.knowledge, writer, sequence)
  }

  /** Ordinal of a write; 0 if it was never submitted. */
  ordinalOf(writer: number, sequence: number): number {
    return this.#ordinals[writer]?.[sequence] ?? 0
  }

  diskOf(ordinal: number): number {
    return this.#disks[ordinal]
  }

  firstSectorOf(ordinal: number): number {
    return this.#firstSectors[ordinal]
  }

  sectorsOf(ordinal: number): number {
    return this.#lengths[ordinal]
  }

  write(ordinal: number): HistoryWrite {
    return {
      runId: this.runId, ordinal, writer: this.#writers[ordinal], sequence: this.#sequences[ordinal],
      disk: this.#disks[ordinal], firstSector: this.#firstSectors[ordinal], sectors: this.#lengths[ordinal],
    }
  }
}
