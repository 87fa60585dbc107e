import type { RecordKind } from '../../core/record/index.ts'

/** Where a sync puts what it read; the capture recorder. */
export type SyncSink = {
  sync(disk: number, offsetBytes: number, data: Buffer, start: number, end: number): void
  takeLarge(kind: typeof RecordKind.sync, disk: number, offsetBytes: number, lengthBytes: number, slab: Buffer): void
  range(kind: RecordKind, disk: number, offsetBytes: number, lengthBytes: number): void
}
