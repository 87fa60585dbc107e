// Where captured frames wait until they are durable at the recovery site: memory, bounded by a budget per VM. The capture
// recorder pushes, the stream sender takes, its acknowledgements release. (The spill file will be the next step of the ladder.)
// Nothing here decides what happens when the budget is used up; the capture worker does.
export { FrameQueue } from './frame-queue.ts'
export type { QueuedFrame } from './frame-queue.ts'
export { SlabPool } from './slab-pool.ts'
