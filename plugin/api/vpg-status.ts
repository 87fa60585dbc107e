import type { VmStatus, VpgStatus } from '../../core/api/index.ts'
import type { MemberReport, VerifyRecord, Vpg } from '../protect/index.ts'

type ProtectedVm = Vpg['vms'][number]

/** A group is late when its newest checkpoint is older than so many intervals. */
const LATE_INTERVALS = 3

const syncOf = (vm: ProtectedVm, nowUnixMs: number): VmStatus['sync'] => {
  const { state } = vm
  if (state.is !== 'syncing') return undefined
  const seconds = Math.max(0.001, (nowUnixMs - state.sinceUnixMs) / 1000)
  const rateBytesPerSec = state.doneBytes / seconds
  const left = Math.max(0, state.totalBytes - state.doneBytes)
  return { kind: state.kind, doneBytes: state.doneBytes, totalBytes: state.totalBytes, ...(state.sentBytes === undefined ? {} : { sentBytes: state.sentBytes }), rateBytesPerSec, secondsLeft: rateBytesPerSec > 0 ? left / rateBytesPerSec : null }
}

const verifyOf = (vm: ProtectedVm, last: VerifyRecord | undefined): VmStatus['verify'] => {
  const { verifying } = vm
  if (verifying === undefined && last === undefined) return undefined
  const { atUnixMs = 0, comparedBytes = 0, undecidedBytes = 0, differingBytes = 0, foundEver = 0 } = last ?? {}
  return { ...(verifying === undefined ? {} : { running: verifying }), ...(last === undefined ? {} : { last: { atUnixMs, comparedBytes, undecidedBytes, differingBytes, foundEver } }) }
}

const vmStatus = (vm: ProtectedVm, last: VerifyRecord | undefined, node: string, nowUnixMs: number): VmStatus => {
  const { stats, state } = vm
  const sync = syncOf(vm, nowUnixMs)
  const verify = verifyOf(vm, last)
  return {
    vmId: vm.vmId,
    node,
    state: state.is,
    reason: state.why,
    sinceUnixMs: state.sinceUnixMs,
    ...(sync === undefined ? {} : { sync }),
    ...(verify === undefined ? {} : { verify }),
    ...(vm.joining === undefined ? {} : { joining: { ...vm.joining, keys: [...vm.joining.keys] } }),
    ...(state.is !== 'tracking' || state.rounds === undefined ? {} : { rounds: state.rounds }),
    ...(vm.holds.length === 0 ? {} : { holds: [...vm.holds] }),
    receivedSeq: stats?.receivedSeq ?? 0,
    durableSeq: stats?.durableSeq ?? 0,
    bufferedBytes: stats?.heldBytes ?? 0,
    spilledBytes: stats?.spilledBytes ?? 0,
    disks: vm.disks.map(({ key, sizeBytes }) => ({ key, sizeBytes })),
    ackLatencyUs: { p50: stats?.ack.p50Us ?? 0, p99: stats?.ack.p99Us ?? 0, max: Math.max(stats?.ack.maxUs ?? 0, stats?.ack.held.maxUs ?? 0), held: stats?.ack.held.maxUs ?? 0 },
  }
}

const unknownVm = (vmId: number, node: string | undefined, reason: string, nowUnixMs: number): VmStatus => ({
  vmId, ...(node === undefined ? {} : { node }), state: 'unknown', reason, sinceUnixMs: nowUnixMs,
  receivedSeq: 0, durableSeq: 0, bufferedBytes: 0, disks: [], ackLatencyUs: { p50: 0, p99: 0, max: 0 },
})

/** What this node tells the others of its members. */
export const memberReport = (vpg: Vpg, nowUnixMs: number): MemberReport & { name: string } => {
  const { lastValid } = vpg
  return {
    name: vpg.definition.name, abandonedCuts: vpg.abandonedCuts, ...(lastValid === undefined ? {} : { lastValid }),
    vms: vpg.vms.map((vm) => vmStatus(vm, vpg.verified(vm.vmId), vpg.peers.nodeName, nowUnixMs)),
  }
}

/** All members: those here, and what other nodes say of theirs. */
const allMembers = (vpg: Vpg, nowUnixMs: number): { vms: VmStatus[]; abandonedCuts: number } => {
  const { view, peers, definition } = vpg
  const ours = memberReport(vpg, nowUnixMs)
  const known = new Map(ours.vms.map((vm) => [vm.vmId, vm]))
  const whyUnknown = new Map<string, string>()
  let { abandonedCuts } = ours
  for (const node of vpg.otherNodes) {
    const news = peers.news(node, definition.name)
    if (!news.known) whyUnknown.set(node, news.why)
    else for (const vm of news.report?.vms ?? []) if (view.nodeOf.get(vm.vmId) === node) known.set(vm.vmId, vm)
    abandonedCuts += news.known ? (news.report?.abandonedCuts ?? 0) : 0
  }
  const vms = definition.vmIds.map((vmId) => {
    const vm = known.get(vmId)
    if (vm !== undefined) return vm
    const node = view.nodeOf.get(vmId)
    const reason = node === undefined ? 'it is on no node of this cluster' : (whyUnknown.get(node) ?? `node ${node} has not taken it up yet`)
    return unknownVm(vmId, node, reason, nowUnixMs)
  })
  return { vms, abandonedCuts }
}

/** What an operator sees of a group: a state, always with its reason, and an RPO that is null when nobody knows it. */
export const vpgStatus = (vpg: Vpg, nowUnixMs: number): VpgStatus => {
  const { definition, lastValid } = vpg
  const { vms, abandonedCuts } = allMembers(vpg, nowUnixMs)
  const ageMs = vpg.lastValidAgeMs(nowUnixMs)
  const rpoMs = ageMs === undefined ? null : Math.round(ageMs)
  const behind = vms.filter(({ state }) => state !== 'streaming')
  const late = rpoMs !== null && rpoMs > LATE_INTERVALS * definition.checkpointEveryMs
  const [state, reason] = ((): [VpgStatus['state'], string] => {
    const fenced = behind.find((vm) => vm.state === 'fenced')
    if (fenced !== undefined) return ['fenced', fenced.reason]
    if (behind.length > 0) {
      const why = behind.map((vm) => `VM ${vm.vmId} is ${vm.state}: ${vm.reason}`).join('; ')
      if (behind.every((vm) => vm.state === 'detached') && behind.length === vms.length) return ['stopped', why]
      return [lastValid === undefined ? 'initializing' : 'degraded', why]
    }
    if (lastValid === undefined) return ['initializing', 'no checkpoint is valid yet']
    if (late) return ['degraded', `the newest valid checkpoint is ${Math.round((rpoMs ?? 0) / 1000)} s old`]
    const joining = vms.flatMap((vm) => (vm.joining === undefined ? [] : [`${vm.joining.keys.join(', ')} of VM ${vm.vmId} is copied for the first time and in no checkpoint yet`]))
    return ['protected', ['all VMs are streaming', ...joining].join('; ')]
  })()
  return {
    name: definition.name, state, reason, rpoMs, checkpointEveryMs: definition.checkpointEveryMs, abandonedCuts,
    ...(lastValid === undefined ? {} : { lastCheckpoint: lastValid }),
    vms,
  }
}
