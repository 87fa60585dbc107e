// Protection of VMs: finds their QEMU, attaches capture, runs syncs, notices what is lost and begins again; groups them into VPGs
// and has checkpoints cut, with other nodes where members run there. The one place where capture (worker), QEMU (QMP) and checkpoints meet. plugin/main.ts makes VPGs from
// the definitions. It keeps no QMP connection open and never touches the guest's data itself.
export { Vpg } from './vpg.ts'
export type { VpgDefinition, VpgEvent, VpgOptions } from './vpg.ts'
export { GroupView, noPeers } from './vpg-peers.ts'
export type { MemberReport, NodeNews, VpgPeers } from './vpg-peers.ts'
export type { AgentAddress, ProtectSettings } from './protect-settings.ts'
export type { VmState } from './vm-state.ts'
export { readVmConfig, vmExists } from './vm-files.ts'
export { VerifyRecords } from './verify-record.ts'
export type { VerifyRecord } from './verify-record.ts'
export { VerifySchedule } from './verify-schedule.ts'
export { BandwidthKeeper } from './bandwidth-keeper.ts'
export type { LineUser, Priority } from './bandwidth-keeper.ts'
