// Trimmed space is given back. A mirror job keeps a guest's discards from the storage (probed on each node, never assumed), so thin storage of a protected VM would only grow: in a bracket, once in a
// while and off the peak, capture is suspended, the guest trims by its agent, and capture goes on.
// Called by plugin/api. It knows nothing of capture or of the journal: suspending, resuming and the sync that follows are plugin/protect's.
export { passesDiscards, reclaim } from './reclaim.ts'
export type { ReclaimReport, ReclaimVm } from './reclaim.ts'
export { ReclaimSchedule } from './reclaim-schedule.ts'
export type { Discards, ReclaimSettings } from './reclaim-schedule.ts'
