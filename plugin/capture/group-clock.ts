/**
 * The shared counter of a VPG on one node (semantics.md, Order and consistency). Raising it *is* the group cut: everything stamped
 * with a value up to the one before the raise is closed under "precedes".
 *
 * One per VPG and node, in memory shared by the VPG's workers.
 */
export class GroupClock {
  readonly buffer: SharedArrayBuffer
  readonly #words: Int32Array

  constructor(buffer = new SharedArrayBuffer(4)) {
    this.buffer = buffer
    this.#words = new Int32Array(buffer)
  }

  /** The present value. A worker reads it once per batch: after the batch's last request has arrived, before its first acknowledgement. */
  read(): number {
    return Atomics.load(this.#words, 0)
  }

  /** Cuts: returns c such that the cut is "everything stamped with E <= c". */
  cut(): number {
    return Atomics.add(this.#words, 0, 1)
  }
}

/**
 * Remembers, for one worker, which sequence was the last one stamped with each value of the counter, for as long as a cut may ask.
 */
export class CutLog {
  #e = 0
  #lastSeqOfE = 0
  #past: { e: number; lastSeq: number }[] = []

  /** A batch has been parsed and is stamped `e`; its records are those up to `lastSeq`, above those of the batch before. */
  stamp(e: number, lastSeq: number): void {
    if (e !== this.#e) {
      this.#past.push({ e: this.#e, lastSeq: this.#lastSeqOfE })
      if (this.#past.length > 64) this.#past.shift()
      this.#e = e
    }
    this.#lastSeqOfE = lastSeq
  }

  /** The last sequence stamped with a value up to `c`; undefined if that is too long ago to be known. */
  namedSeq(c: number): number | undefined {
    if (this.#e <= c) return this.#lastSeqOfE
    return this.#past.findLast(({ e }) => e <= c)?.lastSeq
  }

  /** A new attach begins: everything up to `lastSeq` belongs to the past. */
  reset(e: number, lastSeq: number): void {
    this.#e = e
    this.#lastSeqOfE = lastSeq
    this.#past = []
  }
}
