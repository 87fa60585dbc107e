// The lab: real QEMU guests under a directory that is laid out like a Proxmox node (var/run/qemu-server, etc/pve), started with the
// command line that Proxmox VE 8.4 or 9.x would use. Tests, the write-order proof, the benches and `npm run lab` call it.
// startVm starts QEMU without an OS; bootGuest starts a small Linux and offers a command channel into it.
// Everything here is disposed with `await using`; a VM dies with the process that started it unless it is told otherwise.
// The lab never speaks on ID.qmp (that socket is for the programs under test), never touches files outside its root directory and
// .cache/lab, never sends a signal to a process it did not start, and holds no policy of the product: it knows nothing of capture or journals.
export { startVm, attachVm, runningPid } from './vm.ts'
export { LabVm } from './lab-vm.ts'
export type { StartVmOptions } from './vm.ts'
export { machineOf, proxmoxCommandLine } from './command-line.ts'
export type { VmDisk, VmShape } from './command-line.ts'
export { makeNode, pathsOf, unregisterVm } from './node-files.ts'
export { Monitor } from './monitor.ts'
export { ConsoleLog } from './console-log.ts'
export { lastingLeaksOf, leaksOf, makeTempDir } from './tempdir.ts'
export type { TempDir } from './tempdir.ts'
export { endProcess, isAlive, processesWith, runTool, tool, waitForEnd, withDeadline } from './process.ts'
export type { ToolOptions, ToolResult } from './process.ts'
export { attachGuest, bootGuest, Guest } from './guest.ts'
export type { BootGuestOptions } from './guest.ts'
export type { CommandResult, GuestJob } from './channel.ts'
export { guestImage } from './guest-image.ts'
export { checkPrefix, durableRecord, GroupWriter, ioGap, readJournal, recordOf, startGapMeter, startJournalWriter, untilRecord } from './workloads.ts'
export type { IoGap, PrefixReport } from './workloads.ts'
export { manifestDifferences, manifestOf, runRansomware, writeDocuments } from './documents.ts'
export type { Manifest } from './documents.ts'
export { checkExt4, createOverlay, extractExt4, makeBlankImage, makeExt4Image } from './disk-image.ts'
export type { Ext4Report } from './disk-image.ts'
export { siteDaemons, startSiteDaemons } from './site-daemons.ts'
export type { RunningDaemon, SiteDaemon } from './site-daemons.ts'
