// Hashes of what a VM's replica holds, for delta syncs and online verify (docs/decisions/delta-sync.md). The receiving end of a stream opens a lane
// and passes requests on; the work is done in one worker thread for all VMs, on the VM's files alone, in turns and bounded.
// It reads recovery points and mirrors, holds pins while it does, and never writes anything.
export { HashDesk } from './hash-desk.ts'
export type { HashAsker, HashDeskOptions, HashLane } from './hash-desk.ts'
export { openExtentReader } from './extent-reader.ts'
export { hashExtents } from './hash-extents.ts'
