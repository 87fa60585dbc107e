// Records and frames: the bytes that travel from plugin to agent and that the journal is made of (docs/format.md).
// The plugin's capture worker builds frames, the agent checks and appends them, recovery points and the write-order proof
// read them. Pure code: no file, no socket, no clock. It never decides what a record means for a disk; that is linear
// replay, in agent/journal.
export * from './layout.ts'
export { RecordTable, decodeFramePayload, parseFrame, parseFrameHeader, recordJson, verifyFrameBody } from './frame.ts'
export type { Frame, FrameHeader } from './frame.ts'
export { FrameBuilder } from './frame-builder.ts'
export type { Compressor, FrameParts, FrameSeal, SealedFrame } from './frame-builder.ts'
export { adaptiveZstd } from './compression.ts'
export type { CheckpointKind, CheckpointMark, DiskEntry, EpochMark, SyncKind, SyncMark, SyncEndMark, ProofMark } from './marks.ts'
export { parseCheckpointMark, parseEpochMark } from './marks.ts'
