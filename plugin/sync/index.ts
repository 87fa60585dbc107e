// Bulk copies: initial and bitmap sync, read through QEMU's own read-only NBD export and put into the stream as records between
// live writes. Runs inside the capture worker, since the race against live writes is decided within one event loop.
// Knows nothing of QMP (plugin/qemu opens the export) and nothing of the network.
export { RaceGuard } from './race-guard.ts'
export type { Span } from './race-guard.ts'
export { SyncRun } from './sync-run.ts'
export type { SyncDisk, SyncOptions, SyncSink } from './sync-run.ts'
