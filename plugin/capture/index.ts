// Capture of a VM's writes: the NBD target that QEMU's mirror jobs write to, in a worker thread per VM. A request becomes a record
// and is acknowledged at once; frames go to plugin/buffer and by plugin/replicate to the agent; syncs run beside them. It lets go
// of the guest by itself when memory is full or acknowledgements get slow.
// Called by plugin/protect. It never talks QMP: attaching and detaching the jobs is plugin/qemu.
export { CaptureWorker } from './capture-worker.ts'
export type { CaptureWorkerOptions } from './capture-worker.ts'
export { CaptureSession } from './capture-session.ts'
export type { CaptureSessionOptions } from './capture-session.ts'
export { CutHold } from './cut-hold.ts'
export { GroupClock } from './group-clock.ts'
export type { AckLatency } from './ack-meter.ts'
export type { CaptureEvent, CaptureStats, Disowned } from './messages.ts'
