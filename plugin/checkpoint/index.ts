// Checkpoints are cut here, at the source, so that history goes on while the link is down: labels, the schedule, the group cut.
// plugin/protect calls it for each VPG. It knows nothing of QEMU or of the network; markers are put into streams by the capture workers.
export { CheckpointLabels } from './checkpoint-label.ts'
export { cronExpression, scheduleCheckpoints } from './schedule.ts'
export { cutOnOneNode } from './group-cut.ts'
export type { CutOutcome } from './group-cut.ts'
