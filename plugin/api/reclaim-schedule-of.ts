import { join } from 'node:path'
import type { EventLog } from '../../core/api/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { readVmConfig } from '../protect/index.ts'
import type { ProtectSettings } from '../protect/index.ts'
import { probeDiscards } from '../qemu/index.ts'
import { ReclaimSchedule, passesDiscards, reclaim } from '../reclaim/index.ts'
import type { ReclaimSettings, ReclaimVm } from '../reclaim/index.ts'

type Options = { reclaim: ReclaimSettings | undefined; settings: ProtectSettings; log: Logger; events: EventLog; vms: () => readonly ReclaimVm[] }

const never: ReclaimSettings = { everyMs: 0, from: '00:00', to: '00:00', maxMs: 0 }

/** The schedule of this node: its QEMU, its VMs as Proxmox lays them out, its events. */
export const reclaimScheduleOf = ({ reclaim: wanted, settings, log, events, vms }: Options): ReclaimSchedule => {
  const { paths, runDirectory, stateDirectory } = settings
  return new ReclaimSchedule({
    settings: wanted ?? never, stateDirectory, vms, log, now: () => new Date(),
    probe: () => probeDiscards({ directory: runDirectory }),
    wants: async (vmId) => passesDiscards((await readVmConfig(paths, vmId)) ?? ''),
    reclaim: (vm, maxMs) => reclaim(vm, join(paths.qemuServerDirectory, `${vm.vmId}.qga`), maxMs),
    onReclaimed: (vmId, { trimmedBytes, failed }) => {
      const trouble = failed.length === 0 ? '' : `; not trimmed: ${failed.join('; ')}`
      events.append({ level: failed.length === 0 ? 'info' : 'warn', kind: 'space-reclaimed', message: `VM ${vmId}: the guest has trimmed ${trimmedBytes} bytes${trouble}`, context: { vmId, trimmedBytes } })
    },
  })
}
