// The mirror: the recovery site's full copy of each disk of a VM as of the oldest recoverable point: sparse raw files, or qcow2 files and block
// devices through a qemu-storage-daemon (docs/decisions/mirror-storage.md).
// Who calls it: agent/journal applies the frames of an initial sync and promotions to it; recovery points read it (below the journal).
// A mirror disk reads as zeroes where nothing was written and behind its end. Nothing is durable before datasync.
// It never decides what may be applied (agent/journal and promotion do), never shrinks a disk, never reads the journal,
// and does not know where a mirror stands: that is in vm.json.
export type { MirrorDisk, ReadableMirror } from './mirror-disk.ts'
export { FileMirror } from './file-mirror.ts'
export { diskOfMirrorFile, MirrorStorage, mirrorFileName } from './mirror-storage.ts'
export type { MirrorStorageOptions } from './mirror-storage.ts'
export type { MirrorSpec } from './mirror-record.ts'
export { chooseMirror } from './choose-mirror.ts'
export type { MirrorChoices } from './choose-mirror.ts'
export { MirrorSet } from './mirror-set.ts'
export { mirrorBytes, mirrorHasData, openReadableMirror } from './readable-mirror.ts'
export { mapData, splitByMap } from './data-map.ts'
export type { DataMap } from './data-map.ts'
export { ExtentSums, isZeroes, SUM_EXTENT_BYTES, sumOf, sumsFileName, UNKNOWN_SUM } from './extent-sums.ts'
