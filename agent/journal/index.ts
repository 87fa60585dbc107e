// The journal: the durable store of one VM at the recovery site (docs/format.md).
//
// agent/ingest opens a VmStore for each VM, gives it the frames of the stream and acknowledges what `onDurable` says; recovery
// points read frames by (segment, offset); the checkpoint catalogue takes marks from `onRecords` and is rebuilt from `marks()`.
// One SegmentSealer serves all VMs of the agent: its worker thread checks, digests and indexes closed segments.
//
// It never acknowledges what is not on disk, never repeats a failed write or fsync on the same file, never changes a sealed
// segment, never returns bytes that do not match their checksum, and drops nothing silently: torn tails and damage are reported
// with their sequences. BaseKeeper moves the mirror up and takes segments away that it has; which record to move to, and whether anybody
// still needs what is below, agent/retention decides.
export { VmStore } from './vm-store.ts'
export type { EpochAnswer, StoreCondition, VmStoreOptions } from './store-options.ts'
export { SegmentSealer } from './segment-sealer.ts'
export { SEGMENT_LIMITS } from './journal-log.ts'
export type { Clock, SegmentLimits } from './journal-log.ts'
export type { JournalMark } from './frame-checks.ts'
export type { FrameRecords, StoredFrame } from './journal-reader.ts'
export { isInside } from './segment-info.ts'
export type { Damage, OpenReport, SegmentInfo } from './segment-info.ts'
export type { VerifyReport } from './verify-journal.ts'
export { loadVmState, recoverableFrom, syncDirectory } from './vm-state.ts'
export { damagedExtents, isReached } from './damage-reach.ts'
export { readDamageFile } from './damage-book.ts'
export type { DamageBook, DamagedSpan, MirrorDamage } from './damage-book.ts'
export type { BadPart, VerifiedSegment } from './verify-segment.ts'
export { isFull } from './store-full.ts'
export { BaseKeeper } from './base-keeper.ts'
export type { PromoteOptions, PromotionProgress } from './base-keeper.ts'
export type { PromotionPace } from './promote-records.ts'
export type { VmState } from './vm-state.ts'
