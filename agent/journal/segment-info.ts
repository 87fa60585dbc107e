/** A segment as the store knows it. `lastSeq` is firstSeq - 1 while it is empty. */
export type SegmentInfo = {
  readonly segmentNumber: number
  readonly path: string
  readonly firstSeq: number
  readonly createdAtUnixMs: number
  lastSeq: number
  recordCount: number
  /** Wall time of the first and the last frame, 0 while there is none: labels only. */
  firstAtUnixMs: number
  lastAtUnixMs: number
  /** Where the (durable) frames end, and where the leaf run begins if the segment is sealed. */
  framesEndBytes: number
  /** Size of the leaf run; 0 while not sealed. */
  runBytes: number
  fileBytes: number
  sealed: boolean
  /** A frame or the header could not be believed: such a segment is kept, never sealed and never appended to. */
  damaged: boolean
  /** SHA-256 over header and frames; undefined while not sealed. */
  digest: Buffer | undefined
  previousDigest: Buffer
}

/** A stretch of sequences that cannot be believed, or is missing, and why. */
export type Damage = {
  segment: number
  firstSeq: number
  lastSeq: number
  what: string
  /** Where the damaged frames stand in the segment, if that is known. */
  fromBytes?: number
  toBytes?: number
  /** When a scrub confirmed it; absent: somebody met it, and it is to be looked at. */
  foundAtUnixMs?: number
  /** No state from this sequence on needs them: all that they held was written again by then. */
  healedFromSeq?: number
}

/** It is about records of the segment, not about some that are missing before or behind it. */
export const isInside = ({ segmentNumber, firstSeq, lastSeq }: SegmentInfo, damage: Damage): boolean => damage.segment === segmentNumber && damage.lastSeq >= firstSeq && damage.firstSeq <= lastSeq

/** What opening a journal found and mended. */
export type OpenReport = {
  /** Cut from the end of the last segment: nobody had been told that it was durable. `lastSeq` is undefined if no header was readable. */
  tornTail?: { segment: number; firstSeq: number; lastSeq: number | undefined; cutBytes: number }
  /** Segments that will be sealed again: their sealing was interrupted, or their trailer is damaged. */
  resealed: number[]
  scannedBytes: number
}

/** Damage found so far, each stretch once, bounded. */
export class DamageList {
  #list: Damage[] = []
  readonly #bound: number

  constructor(bound = 1024) {
    this.#bound = bound
  }

  /** @returns false if it was known already, or the list is full */
  add(damage: Damage): boolean {
    const known = this.#list.some((one) => one.segment === damage.segment && one.firstSeq <= damage.firstSeq && one.lastSeq >= damage.lastSeq)
    if (known || this.#list.length >= this.#bound) return false
    this.#list.push(damage)
    return true
  }

  /** A segment was read from end to end: this is what is damaged in it. */
  replace(info: SegmentInfo, found: readonly Damage[]): void {
    this.#list = [...this.#list.filter((one) => !isInside(info, one)), ...found].slice(0, this.#bound)
  }

  /** Every stretch as `change` says; one that became undefined is forgotten. */
  update(change: (damage: Damage) => Damage | undefined): void {
    this.#list = this.#list.flatMap((damage) => change(damage) ?? [])
  }

  all(): readonly Damage[] {
    return this.#list
  }
}
