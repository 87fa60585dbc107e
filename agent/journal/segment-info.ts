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
export type Damage = { segment: number; firstSeq: number; lastSeq: number; what: string }

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
  readonly #list: Damage[] = []
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

  all(): readonly Damage[] {
    return this.#list
  }
}
