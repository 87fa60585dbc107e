// Checkpoints are cut here, at the source, so that history goes on while the link is down: labels, the schedule, the group cut on one
// node (a shared counter, nothing is held) and over several (two phases, acknowledgements are held for some milliseconds).
// plugin/protect calls it for each VPG. It knows nothing of QEMU or of the network: markers are put into streams by the capture workers,
// other nodes are reached through the CutParticipants that plugin/cluster makes.
export { CheckpointLabels } from './checkpoint-label.ts'
export { cronExpression, scheduleCheckpoints } from './schedule.ts'
export { cutOnOneNode } from './group-cut.ts'
export { LocalPart } from './local-part.ts'
export type { CutWorker, LocalMembers } from './local-part.ts'
export { cutOverNodes } from './cut-over-nodes.ts'
export type { CommitAnswer, CutOverNodesOptions, CutParticipant, HoldAnswer } from './cut-over-nodes.ts'
export { beginTwoPhaseCut, nextTwoPhaseCut } from './two-phase-cut.ts'
export type { CutOutcome, TwoPhaseCut, TwoPhaseEffect, TwoPhaseEvent, TwoPhaseStep } from './two-phase-cut.ts'
