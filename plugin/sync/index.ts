// Bulk copies (initial and bitmap sync) and comparisons by hash (delta sync, verify), read through QEMU's own read-only NBD export and put into the stream as records between
// live writes. Runs inside the capture worker, since the race against live writes is decided within one event loop.
// Knows nothing of QMP (plugin/qemu opens the export) and nothing of the network.
export { RaceGuard } from './race-guard.ts'
export type { Span } from './race-guard.ts'
export { SyncRun } from './sync-run.ts'
export type { SyncDisk, SyncOptions } from './sync-run.ts'
export type { SyncSink } from './sync-sink.ts'
export { CompareScan } from './compare-scan.ts'
export type { CompareOptions, DifferenceSink, Range } from './compare-scan.ts'
export { DeltaRun } from './delta-run.ts'
export type { HashSource } from './hash-source.ts'
export { CopyPace } from './copy-pace.ts'
export { DurableProgress } from './durable-progress.ts'
export { RecordedSince } from './recorded-since.ts'
export { VerifyRound } from './verify-round.ts'
export type { DiskRange, VerifyDisk, VerifyVerdict } from './verify-round.ts'
