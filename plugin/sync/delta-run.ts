import { RecordKind } from '../../core/record/index.ts'
import { CompareScan } from './compare-scan.ts'
import type { CompareOptions, DifferenceSink, Range } from './compare-scan.ts'
import type { Span } from './race-guard.ts'
import type { SyncSink } from './sync-sink.ts'

const PIECE_BYTES = 64 * 1024
const LARGE_BYTES = 256 * 1024
const PROGRESS_EVERY_MS = 1_000

export type DeltaOptions = Omit<CompareOptions, 'sink' | 'onProgress' | 'isEnough' | 'differsIfUnanswered'> & {
  sink: SyncSink
  /** `sentBytes`: what became records, of data and of zeroes, since the last call. */
  onProgress: (readBytes: number, comparedToBytes: number, sentBytes: number) => void
}

/** A delta sync of one disk from `fromBytes` on: what differs becomes records, everything else costs its hashes only. */
export class DeltaRun implements DifferenceSink {
  readonly #options: DeltaOptions
  #sentBytes = 0
  #progressBytes = -1
  #reportedMs = performance.now()

  constructor(options: DeltaOptions) {
    this.#options = options
  }

  /** Resolves when everything that differs has become records, and `syncProgress` says so. @throws as CompareScan.run */
  async run(fromBytes: number): Promise<void> {
    const { disk } = this.#options
    this.#progressBytes = fromBytes
    const scan = new CompareScan({ ...this.#options, sink: this, differsIfUnanswered: true, onProgress: (readBytes, comparedToBytes) => this.#progress(readBytes, comparedToBytes, false) })
    await scan.run(fromBytes, disk.sizeBytes)
    this.#progress(0, disk.sizeBytes, true)
  }

  zeroes(range: Range, spans: readonly Span[]): void {
    for (const { offsetBytes, lengthBytes } of within(range, spans)) {
      this.#options.sink.range(RecordKind.syncZero, this.#options.disk.disk, offsetBytes, lengthBytes)
      this.#sentBytes += lengthBytes
    }
  }

  data(read: Range, slab: Buffer, different: readonly Range[], spans: readonly Span[]): boolean {
    const { sink, disk } = this.#options
    const [first] = different
    const isWhole = first.lengthBytes === read.lengthBytes && spans.length === 1 && spans[0].lengthBytes === read.lengthBytes
    if (isWhole && read.lengthBytes >= LARGE_BYTES) {
      sink.takeLarge(RecordKind.sync, disk.disk, read.offsetBytes, read.lengthBytes, slab)
      this.#sentBytes += read.lengthBytes
      return true
    }
    for (const { offsetBytes, lengthBytes } of different.flatMap((range) => within(range, spans))) {
      for (let at = 0; at < lengthBytes; at += PIECE_BYTES) {
        const start = offsetBytes - read.offsetBytes + at
        sink.sync(disk.disk, offsetBytes + at, slab, start, start + Math.min(PIECE_BYTES, lengthBytes - at))
      }
      this.#sentBytes += lengthBytes
    }
    return false
  }

  #progress(readBytes: number, comparedToBytes: number, now: boolean): void {
    const { sink, disk, onProgress } = this.#options
    onProgress(readBytes, comparedToBytes, this.#sentBytes)
    this.#sentBytes = 0
    if (!now && performance.now() - this.#reportedMs < PROGRESS_EVERY_MS) return
    if (comparedToBytes <= this.#progressBytes) return
    this.#reportedMs = performance.now()
    this.#progressBytes = comparedToBytes
    sink.range(RecordKind.syncProgress, disk.disk, comparedToBytes, 0)
  }
}

/** The parts of `spans` that lie in `range`. */
const within = ({ offsetBytes, lengthBytes }: Range, spans: readonly Span[]): Range[] =>
  spans.flatMap((span) => {
    const from = Math.max(offsetBytes, span.offsetBytes)
    const to = Math.min(offsetBytes + lengthBytes, span.offsetBytes + span.lengthBytes)
    return from < to ? [{ offsetBytes: from, lengthBytes: to - from }] : []
  })
