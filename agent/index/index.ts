// The index of a VM's journal: which frame holds the newest data of a range, as of a sequence (docs/format.md, Run).
// The journal's sealing worker calls buildLeafRun; recovery points and promotion ask an IndexView. Everything here can be
// rebuilt from the segments' frames, and a damaged page is bypassed by what lies below it.
// Only frames' record tables are understood here; data are never read, and no segment is ever changed.
// The layout of segments stands here because both the journal and the index need it and the journal builds on the index.
export {
  SEGMENT_DIGEST_BYTES, SEGMENT_HEADER_BYTES, SEGMENT_TRAILER_BYTES, encodeSegmentHeader, encodeSegmentTrailer, firstSeqOfSegmentFile,
  parseSegmentHeader, parseSegmentTrailer, segmentFileName,
} from './segment-layout.ts'
export type { SegmentHeader, SegmentTrailer } from './segment-layout.ts'
export { RecordList } from './record-list.ts'
export { buildLeafRun } from './leaf-run.ts'
export { NO_DATA } from './extent.ts'
export { PageCache } from './page-cache.ts'
export { FilePool } from './file-pool.ts'
export { IndexView } from './index-view.ts'
export type { IndexDamage, IndexViewOptions } from './index-view.ts'
export type { Piece } from './resolve.ts'
export { RunMerger } from './run-merger.ts'
export type { RunMergerOptions } from './run-merger.ts'
export { RUN_FANOUT, mergeVm } from './merge-vm.ts'
export type { MergeReport } from './merge-vm.ts'
export { listSegments, removeRunsBelow } from './vm-files.ts'
export type { SegmentList } from './vm-files.ts'
export { leafExtents } from './leaf-extents.ts'
export type { LeafExtent } from './leaf-extents.ts'
export { scanFrames, scanRecords } from './segment-scan.ts'
