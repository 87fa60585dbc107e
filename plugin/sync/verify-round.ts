import { NbdClient } from '../../core/nbd/index.ts'
import { HASH_EXTENT_BYTES } from '../../core/stream/index.ts'
import type { SlabPool } from '../buffer/index.ts'
import { CompareScan } from './compare-scan.ts'
import type { DifferenceSink, Range } from './compare-scan.ts'
import type { HashSource } from './hash-source.ts'
import { RaceGuard } from './race-guard.ts'
import { RecordedSince } from './recorded-since.ts'

export type DiskRange = { disk: number; offsetBytes: number; lengthBytes: number }
export type VerifyDisk = { disk: number; sizeBytes: number; exportName: string }
/** `undecided`: different, but written meanwhile. Each range is one extent or the end of a disk. */
export type VerifyVerdict = { differences: DiskRange[]; undecided: DiskRange[] }

export type VerifyRoundOptions = {
  exportSocketPath: string
  disks: readonly VerifyDisk[]
  slabs: SlabPool
  hashes: HashSource
  admit: (lengthBytes: number, signal: AbortSignal) => Promise<void>
  onProgress: (readBytes: number) => void
  readsInFlight: number
  signal: AbortSignal
}

/** More suspects than this, and the round ends early: they are settled before it goes on. */
const MAX_SUSPECTS = 512

/**
 * One round of an online verify: compares ranges, remembers which extents were written meanwhile, and gives its verdict after QEMU was made to drain
 * (docs/decisions/delta-sync.md). Records nothing.
 */
export class VerifyRound {
  readonly #options: VerifyRoundOptions
  readonly #recorded: RecordedSince
  readonly #suspects: DiskRange[] = []

  /** From here on `wrote` has to be told of every live operation; `hashes.asOfSeq` names sequences from here on. */
  constructor(options: VerifyRoundOptions) {
    this.#options = options
    this.#recorded = new RecordedSince(options.disks)
  }

  /** A live operation was recorded. */
  wrote(disk: number, offsetBytes: number, lengthBytes: number): void {
    this.#recorded.mark(disk, offsetBytes, lengthBytes)
  }

  /**
   * Compares the ranges, in order.
   * @returns those that were not looked at because there were too many suspects; they are for the next round
   */
  async compare(ranges: readonly DiskRange[]): Promise<DiskRange[]> {
    const { disks, exportSocketPath, signal, onProgress } = this.#options
    const left: DiskRange[] = []
    const isEnough = (): boolean => this.#suspects.length >= MAX_SUSPECTS
    for (const disk of disks) {
      const ofDisk = ranges.filter((range) => range.disk === disk.disk)
      if (ofDisk.length === 0) continue
      await using client = await NbdClient.connect({ path: exportSocketPath }, { exportName: disk.exportName, metaContexts: ['base:allocation'], signal })
      for (const range of ofDisk) {
        const endBytes = range.offsetBytes + range.lengthBytes
        // Nothing becomes a record here, so no live write has to be cut out of anything.
        const scan = new CompareScan({ ...this.#options, disk, client, guard: new RaceGuard(), sink: this.#sinkOf(disk.disk), isEnough, differsIfUnanswered: false, onProgress: (readBytes) => onProgress(readBytes) })
        const comparedToBytes = isEnough() ? range.offsetBytes : await scan.run(range.offsetBytes, endBytes)
        if (comparedToBytes < endBytes) left.push({ disk: disk.disk, offsetBytes: comparedToBytes, lengthBytes: endBytes - comparedToBytes })
      }
    }
    return left
  }

  /** To be asked once everything that was on the source when `compare` ended is captured. */
  verdict(): VerifyVerdict {
    const verdict: VerifyVerdict = { differences: [], undecided: [] }
    for (const suspect of this.#suspects) verdict[this.#recorded.has(suspect.disk, suspect.offsetBytes) ? 'undecided' : 'differences'].push(suspect)
    return verdict
  }

  #sinkOf(disk: number): DifferenceSink {
    const note = ({ offsetBytes, lengthBytes }: Range): void => {
      for (let at = 0; at < lengthBytes; at += HASH_EXTENT_BYTES) this.#suspects.push({ disk, offsetBytes: offsetBytes + at, lengthBytes: Math.min(HASH_EXTENT_BYTES, lengthBytes - at) })
    }
    return {
      zeroes: note,
      data: (_read, _slab, different) => {
        different.forEach(note)
        return false
      },
    }
  }
}
