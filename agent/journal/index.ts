// The journal: the durable store of one VM at the recovery site (docs/format.md).
//
// agent/ingest opens a VmStore for each VM, gives it the frames of the stream and acknowledges what `onDurable` says; recovery
// points read frames by (segment, offset); the checkpoint catalogue takes marks from `onRecords` and is rebuilt from `marks()`.
// One SegmentSealer serves all VMs of the agent: its worker thread checks, digests and indexes closed segments.
//
// It never acknowledges what is not on disk, never repeats a failed write or fsync on the same file, never changes a sealed
// segment, never returns bytes that do not match their checksum, and drops nothing silently: torn tails and damage are reported
// with their sequences. It decides nothing about history: retention and promotion are made elsewhere.
export { VmStore } from './vm-store.ts'
export type { EpochAnswer, StoreCondition, VmStoreOptions } from './store-options.ts'
export { SegmentSealer } from './segment-sealer.ts'
export { SEGMENT_LIMITS } from './journal-log.ts'
export type { Clock, SegmentLimits } from './journal-log.ts'
export type { JournalMark } from './frame-checks.ts'
export type { FrameRecords, StoredFrame } from './journal-reader.ts'
export type { Damage, OpenReport, SegmentInfo } from './segment-info.ts'
export type { VerifyReport } from './verify-journal.ts'
export { loadVmState } from './vm-state.ts'
export type { VmState } from './vm-state.ts'
