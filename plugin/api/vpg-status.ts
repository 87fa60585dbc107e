import type { VmStatus, VpgStatus } from '../../core/api/index.ts'
import type { Vpg } from '../protect/index.ts'

type ProtectedVm = Vpg['vms'][number]

/** A group is late when its newest checkpoint is older than so many intervals. */
const LATE_INTERVALS = 3

const syncOf = (vm: ProtectedVm, nowUnixMs: number): VmStatus['sync'] => {
  const { state } = vm
  if (state.is !== 'syncing') return undefined
  const seconds = Math.max(0.001, (nowUnixMs - state.sinceUnixMs) / 1000)
  const rateBytesPerSec = state.doneBytes / seconds
  const left = Math.max(0, state.totalBytes - state.doneBytes)
  return { kind: state.kind, doneBytes: state.doneBytes, totalBytes: state.totalBytes, rateBytesPerSec, secondsLeft: rateBytesPerSec > 0 ? left / rateBytesPerSec : null }
}

const vmStatus = (vm: ProtectedVm, nowUnixMs: number): VmStatus => {
  const { stats, state } = vm
  const sync = syncOf(vm, nowUnixMs)
  return {
    vmId: vm.vmId,
    state: state.is,
    reason: state.why,
    sinceUnixMs: state.sinceUnixMs,
    ...(sync === undefined ? {} : { sync }),
    receivedSeq: stats?.receivedSeq ?? 0,
    durableSeq: stats?.durableSeq ?? 0,
    bufferedBytes: stats?.heldBytes ?? 0,
    disks: vm.disks.map(({ key, sizeBytes }) => ({ key, sizeBytes })),
    ackLatencyUs: { p50: stats?.ack.p50Us ?? 0, p99: stats?.ack.p99Us ?? 0, max: Math.max(stats?.ack.maxUs ?? 0, stats?.ack.held.maxUs ?? 0) },
  }
}

/** What an operator sees of a group: a state, always with its reason, and an RPO that is null when nobody knows it. */
export const vpgStatus = (vpg: Vpg, nowUnixMs: number): VpgStatus => {
  const { definition, lastValid } = vpg
  const rpoMs = lastValid === undefined ? null : Math.max(0, nowUnixMs - lastValid.atUnixMs)
  const behind = vpg.vms.filter(({ state }) => state.is !== 'streaming')
  const late = rpoMs !== null && rpoMs > LATE_INTERVALS * definition.checkpointEveryMs
  const [state, reason] = ((): [VpgStatus['state'], string] => {
    if (behind.length > 0) {
      const why = behind.map((vm) => `VM ${vm.vmId} is ${vm.state.is}: ${vm.state.why}`).join('; ')
      if (behind.every((vm) => vm.state.is === 'detached') && behind.length === vpg.vms.length) return ['stopped', why]
      return [lastValid === undefined ? 'initializing' : 'degraded', why]
    }
    if (lastValid === undefined) return ['initializing', 'no checkpoint is valid yet']
    if (late) return ['degraded', `the newest valid checkpoint is ${Math.round((rpoMs ?? 0) / 1000)} s old`]
    return ['protected', 'all VMs are streaming']
  })()
  return {
    name: definition.name, state, reason, rpoMs, checkpointEveryMs: definition.checkpointEveryMs, abandonedCuts: vpg.abandonedCuts,
    ...(lastValid === undefined ? {} : { lastCheckpoint: lastValid }),
    vms: vpg.vms.map((vm) => vmStatus(vm, nowUnixMs)),
  }
}
