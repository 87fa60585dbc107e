// Everything that is done to the QEMU of a running VM, over one short QMP connection each time.
// Discovers a VM's disks, attaches capture (dirty bitmap, NBD target, mirror job; on 8.4 the shield on top), takes it away
// again from whatever state it is in, rotates bitmaps, opens read-only exports for sync, reads the guest's write counters.
// Who calls it: plugin/capture (attach, detach, repair, poll) and plugin/sync (exports, bitmaps).
// Steps are data (attach-plan.ts, planRotation) and a thin runner performs them; what to take away is decided from QEMU's own
// state alone, because names of ours are deterministic and begin with 'cdp-'.
// It never touches a node, job, export or bitmap whose name does not begin with 'cdp-', never holds a connection, never
// retries by itself, and leaves nothing behind when an attach fails.
export { discoverDisks } from './disks.ts'
export type { DiskImage, GraphShape, QemuDisk } from './disks.ts'
export { attachCapture } from './attach.ts'
export type { AttachedDisk, AttachOptions } from './attach.ts'
export type { AttachStep } from './attach-plan.ts'
export { detachCapture, repairHalfStates, requireDetachable } from './detach.ts'
export type { DetachOptions, TakenAway } from './detach.ts'
export { closeReadExport, openReadExport } from './read-export.ts'
export type { ReadExport, ReadExportOptions } from './read-export.ts'
export { dropRotated, recordingKeys, rotateBitmaps } from './bitmaps.ts'
export type { RotatedBitmaps } from './bitmaps.ts'
export { beginRound, dropCovered, endRound, holdRound, jobInTheWay, lookAtRound, ownMirrors } from './rounds.ts'
export type { RoundLook } from './rounds.ts'
export type { RoundPlan } from './round-plan.ts'
export { probeDiscards } from './discard-probe.ts'
export type { DiscardFate } from './discard-probe.ts'
export { carriedWith, carryBitmaps, takeOverBitmaps } from './carried-bitmaps.ts'
export type { Carried } from './carried-bitmaps.ts'
export { requireOwnGuest } from './own-guest.ts'
export { drain, lookAtVm } from './look.ts'
export type { VmLook } from './look.ts'
export { readCounters } from './counters.ts'
export type { DiskCounters } from './counters.ts'
export { namesOf } from './names.ts'
export type { DiskNames } from './names.ts'
