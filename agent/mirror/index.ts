// The mirror: the recovery site's full copy of each disk of a VM as of the oldest recoverable point, in sparse raw files.
// Who calls it: agent/journal applies the frames of an initial sync to it; recovery points read it (below the journal).
// A mirror disk reads as zeroes where nothing was written and behind its end. Nothing is durable before datasync.
// It never decides what may be applied (agent/journal and promotion do), never shrinks a file, never reads the journal,
// and keeps no state of its own: where the mirror stands is in vm.json.
export { MirrorDisk } from './mirror-disk.ts'
export { MirrorSet, mirrorFileName } from './mirror-set.ts'
export { writeAll } from './write-all.ts'
