import { join } from 'node:path'
import type { Logger } from '../../core/log/index.ts'
import type { ClientTls } from '../../core/pki/index.ts'
import type { CheckpointMark } from '../../core/record/index.ts'
import type { StateNews } from '../../core/stream/index.ts'
import type { SpillOptions } from '../buffer/index.ts'
import type { Disowned } from '../capture/index.ts'
import type { GroupFence } from './group-fence.ts'
import type { Hold } from './suspension.ts'
import type { VerifyReport } from './verify-procedure.ts'
import type { ProxmoxPaths } from './vm-files.ts'
import type { VmState } from './vm-state.ts'

export type ProtectSettings = {
  paths: ProxmoxPaths
  stateDirectory: string
  /** Unix sockets of ours; short, see sun_path. */
  runDirectory: string
  memoryBytesPerVm: number
  /** Files that memory overflows to; `bytesPerVm` 0, or nothing: none. */
  spill?: { directory: string; bytesPerVm: number; reserveBytes: number }
  lingerMs: number
  /** 0: no limit. */
  syncRateBytesPerSec: number
  /** Online verify; rate 0: no limit, interval 0: only when asked for. */
  verify: { everyMs: number; rateBytesPerSec: number }
  proofEveryMs: number
  /** How often the dirty bitmaps are rotated while streaming. */
  rotateEveryMs: number
  /** How often an incremental round begins while a backup is in the way of capture. Default 10 s. */
  roundEveryMs?: number
  slowAck: { p99Ms: number; maxMs: number }
  /** NBD servers that run inside a VM's QEMU already, by VM id: syncs read through them. */
  existingNbdServers: Record<string, string>
}

export type AgentAddress = { host: string; port: number; tls: ClientTls }

export type ProtectedVmOptions = {
  vmId: number
  vpg: string
  vms: string[]
  settings: ProtectSettings
  agent: AgentAddress
  groupClock: SharedArrayBuffer
  /** Whether the recovery site has taken the group over. */
  fence: GroupFence
  log: Logger
  onChange: (vmId: number, state: VmState) => void
  onNews: (news: StateNews) => void
  /** The recovery site has forgotten a handover of the group: nothing is sent to it. */
  onAhead?: (disowned: Disowned) => void
  /** An online verify came to its end. */
  /** A disk that came belongs to checkpoints from now on. */
  onJoined?: (vmId: number, key: string) => void
  onVerified?: (vmId: number, report: VerifyReport, where: string) => void
  /** Makes the checkpoint of an incremental round, of a group that one VM can cut for alone; without it there are no rounds. */
  roundMark?: () => CheckpointMark
  /** A hold ended at its limit, not by its owner. */
  onHoldExpired?: (vmId: number, hold: Hold) => void
  /** The VM has just come to this node. */
  arrived?: boolean
  nowUnixMs?: () => number
}

export const spillOf = ({ spill }: ProtectSettings, vmId: number): { spill?: SpillOptions } =>
  spill === undefined || spill.bytesPerVm === 0 ? {} : { spill: { directory: join(spill.directory, String(vmId)), limitBytes: spill.bytesPerVm, reserveBytes: spill.reserveBytes } }
