// Recovery points: the disks of a VM as they were after one record, readable at once, whatever the size of disk and history.
// A point is the mirror below and the journal's newest records above, found by agent/index; PointServer offers it over NBD
// to qemu-img, nbdcopy and QEMU itself. The API, failover and drills call openPoint; promotion asks PinRegistry.
// It works on the files of the VM alone (docs/format.md): no object of the ingest side, no thread and no lock is shared.
// It never writes a file, never reads a frame without checking all of it, and never serves data of a damaged one.
export { RecoveryPoint } from './recovery-point.ts'
export type { PointResources, RecoveryPointOptions, StatusExtent } from './recovery-point.ts'
export { PointServer, nbdUri } from './point-server.ts'
export type { OpenPointRequest, OpenedPoint, PointServerOptions, PointVm, ServedDisk } from './point-server.ts'
export { PinRegistry } from './pins.ts'
export type { Pin, PinInfo } from './pins.ts'
export { FrameCache } from './frame-cache.ts'
export { ReadGate } from './read-gate.ts'
export { readBaseState } from './base-state.ts'
