import type { CdpError } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import type { MirrorStorage } from '../mirror/index.ts'
import type { Clock, SegmentLimits } from './journal-log.ts'
import type { SegmentSealer } from './segment-sealer.ts'

export type VmStoreOptions = {
  /** Directory of this VM: vm.json, durable.hint, journal/, runs/ and mirror/ stand in it. Created if missing. */
  directory: string
  /** Site VM id, at most 36 bytes. */
  vm: string
  log: Logger
  clock: Clock
  sealer: SegmentSealer
  /** Where the mirrors are; disposed with the store. Default: sparse files in the VM's directory. */
  mirrors?: MirrorStorage
  /** Told of the bytes of each accepted frame once nobody here looks at them any more. */
  recycle?: (bytes: Buffer) => void
  /** Asked before each commit: an error with context.condition 'full' if the journal must not grow beyond its present bytes. */
  mayGrow?: (journalBytes: number) => CdpError | undefined
  limits?: Partial<SegmentLimits> & {
    /** What may wait to be durable; `accept` refuses beyond. At least one frame of the largest size. */
    queueBytes?: number
    /** Files open for reading. */
    openFiles?: number
  }
}

/** What an attach is told; becomes the `welcome` of the stream. */
export type EpochAnswer = { epoch: number; durableSeq: number; baseComplete: boolean; syncProgress: Record<string, number>; disks: DiskEntry[] }

/**
 * open: frames are taken. full: the file system is full, nothing is taken until an attach finds room again. failed: a write or an
 * fsync failed; nothing more is promised, reading goes on; dispose and open again (which scans). closed: disposed.
 */
export type StoreCondition = 'open' | 'full' | 'failed' | 'closed'
