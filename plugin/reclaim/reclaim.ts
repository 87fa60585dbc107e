import { CdpError } from '../../core/errors/index.ts'
import { GuestAgent } from './guest-agent.ts'

/** A protected VM, as far as a bracket needs it. */
export type ReclaimVm = {
  readonly vmId: number
  readonly state: { is: string; joining?: { failed?: string } }
  suspend(request: { owner: string; reason: string; forMs: number }): Promise<unknown>
  resume(owner: string): Promise<boolean>
}

export type ReclaimReport = { trimmedBytes: number; /** File systems that could not be trimmed, in the guest's words. */ failed: string[] }

const OWNER = 'reclaim'
const AGENT_DEADLINE_MS = 5_000

/**
 * Gives back what the guest has freed on its disks, which a mirror job keeps from the storage: capture is suspended, the guest trims, capture goes on. The trimmed ranges are in
 * QEMU's bitmap, and the sync that follows finds them to be zeroes.
 * @param deadlineMs for the trim; the hold ends then, whatever becomes of us
 * @throws CdpError of the guest agent (nothing was done if it does not answer at all), or CONFLICT: capture cannot be suspended now
 */
export const reclaim = async (vm: ReclaimVm, agentPath: string, deadlineMs: number): Promise<ReclaimReport> => {
  using agent = await GuestAgent.connect(agentPath, AGENT_DEADLINE_MS)
  try {
    await vm.suspend({ owner: OWNER, reason: 'trimmed space is given back to the storage', forMs: deadlineMs })
    return readReport(await agent.execute('guest-fstrim', {}, deadlineMs))
  } finally {
    await vm.resume(OWNER)
  }
}

/** Answer of guest-fstrim: `{paths: [{path, trimmed?, minimum?, error?}]}`. It is the guest's: every part of it may be missing. */
const readReport = (answer: unknown): ReclaimReport => {
  const { paths } = (answer ?? {}) as { paths?: unknown }
  if (!Array.isArray(paths)) throw new CdpError('IO', 'the guest agent does not say what it has trimmed')
  const report: ReclaimReport = { trimmedBytes: 0, failed: [] }
  for (const entry of paths as unknown[]) {
    const { path, trimmed, error } = (entry ?? {}) as { path?: unknown; trimmed?: unknown; error?: unknown }
    if (typeof trimmed === 'number' && Number.isSafeInteger(trimmed) && trimmed > 0) report.trimmedBytes += trimmed
    if (error !== undefined) report.failed.push(`${textOf(path)}: ${textOf(error)}`.slice(0, 200))
  }
  return report
}

const textOf = (value: unknown): string => (typeof value === 'string' ? value : JSON.stringify(value))

/** True if a disk of that configuration passes discards on to its storage (Proxmox: `scsi0: local:vm-100-disk-0,discard=on,...`). Snapshots' sections do not count. */
export const passesDiscards = (config: string): boolean => {
  const [current = ''] = config.split(/^\[/m)
  return current.split('\n').some((line) => /^(?:scsi|virtio|sata|ide)\d+:/.test(line) && /[,\s]discard=on(?:,|\s|$)/.test(line))
}
