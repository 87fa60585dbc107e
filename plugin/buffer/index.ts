// Where captured frames wait until they are durable at the recovery site: memory, bounded by a budget per VM, and files of a bounded size that it
// overflows into (docs/decisions/spill.md). The capture recorder pushes, the stream sender takes, its acknowledgements release.
// Nothing here decides what happens when both are used up; the capture worker does.
export { FrameQueue } from './frame-queue.ts'
export type { QueuedFrame, SendQueue } from './frame-queue.ts'
export { SlabPool } from './slab-pool.ts'
export { SpillFile } from './spill-file.ts'
export type { SpillOptions } from './spill-file.ts'
export { SpillingQueue } from './spilling-queue.ts'
export type { Spill } from './spilling-queue.ts'
