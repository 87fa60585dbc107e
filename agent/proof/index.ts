// The write-order proof: writes that say what they knew, and a checker that says whether the disks of a recovery point are closed under
// "precedes" over all disks and VMs (semantics.md, Proof). Drills and `npm run proof` call it: whoever writes keeps a WriteHistory, stamps
// each write with stampWrite, recovers a checkpoint by any means, and gives the bytes to checkCut.
// Pure code: it opens no file or socket, keeps no clock, writes to no disk, and knows nothing of journals, frames or checkpoints, so that
// it cannot repeat a mistake of theirs.
export { KNOWLEDGE_WINDOW, MAX_WRITERS, STAMP_BYTES, knows, readStamp, stampWrite } from './stamp.ts'
export type { Knowledge, StampedWrite } from './stamp.ts'
export { WriteHistory } from './write-history.ts'
export type { HistoryWrite, WriteHistoryOptions } from './write-history.ts'
export { checkCut, describeViolation } from './check-cut.ts'
export type { CutBracket, CutReport, Violation } from './check-cut.ts'
