// How long history is kept: by time, by size, by free space, and how it thins with age (docs/decisions/retention.md).
//
// RetentionKeeper goes over all groups every few seconds: planRetention (pure) says which checkpoint becomes the oldest, GroupKeeper
// moves every VM of the group there (agent/journal's BaseKeeper does the bytes) and has the catalogue forget what is below,
// Thinner takes out what the policy no longer wants listed. main.ts wires it; the API shows what holds and what limits.
//
// It never lets a wall clock decide, never moves beyond a pin or damage, never gives anything up before all that a promotion needs
// has been read and found whole, and never makes ingest wait.
export { RetentionKeeper } from './retention-keeper.ts'
export type { RetentionKeeperOptions, Space } from './retention-keeper.ts'
export { GroupKeeper } from './group-keeper.ts'
export type { GroupProgress } from './group-keeper.ts'
export { planRetention } from './plan.ts'
export type { CandidateFinder, Plan, PlanFacts, VmFacts } from './plan.ts'
export { checkPolicy, DAY_MS, HOUR_MS, policyFrom, reserveOf } from './policy.ts'
export type { RetentionPolicy, SyncOverflow, ThinningLevel } from './policy.ts'
export { spanMs } from './history-clock.ts'
export type { RaisedAlarm } from './alarms.ts'
export { BUSY_QUEUE_BYTES, Pacer } from './pacer.ts'
