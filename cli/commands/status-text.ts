import type { AgentStatus, AgentVpg, Hold, PluginStatus, VmStatus, VpgStatus } from '../../core/api/index.ts'
import { formatTable } from '../format/table.ts'
import type { Cell, Painter, Style } from '../format/table.ts'
import { formatAge, formatBytes, formatDuration, formatMicroseconds, formatTime, printable } from '../format/units.ts'

const stateStyles: Record<VpgStatus['state'] | VmStatus['state'], Style> = {
  protected: 'green',
  streaming: 'green',
  initializing: 'yellow',
  attaching: 'yellow',
  syncing: 'yellow',
  suspended: 'yellow',
  degraded: 'red',
  stopped: 'red',
  detached: 'red',
  tracking: 'red',
  fenced: 'red',
  unknown: 'red',
}
export const stateCell = (state: VpgStatus['state'] | VmStatus['state']): Cell => ({ text: state, style: stateStyles[state] })

/** An unknown RPO is never shown as a good one; one above three intervals is marked. */
export const rpoCell = (rpoMs: number | null, checkpointEveryMs?: number): Cell => {
  if (rpoMs === null) return { text: 'unknown', style: 'red' }
  const late = checkpointEveryMs !== undefined && rpoMs > 3 * checkpointEveryMs + 1000
  return { text: formatDuration(rpoMs), style: late ? 'red' : 'green' }
}

const linkCell = (connected: boolean): Cell => (connected ? { text: 'connected', style: 'green' } : { text: 'disconnected', style: 'red' })
const show = (cell: Cell, paint: Painter): string => (typeof cell === 'string' ? cell : paint(cell.style, cell.text))
const moment = (unixMs: number, nowUnixMs: number): string => `${formatTime(unixMs)} (${formatAge(unixMs, nowUnixMs)})`

export const pluginStatusText = (status: PluginStatus, vpgs: VpgStatus[], paint: Painter, nowUnixMs: number): string => {
  const { peer } = status
  const peerText = [show({ text: peer.state, style: peer.state === 'connected' ? 'green' : 'red' }, paint), peer.address, peer.reason]
    .filter((part) => part !== undefined)
    .map((part, index) => (index === 0 ? part : printable(part)))
  const discards = status.discards === undefined ? '' : `Discards  ${status.discards.fate}: ${printable(status.discards.reason)}\n`
  const head = `${paint('bold', 'Plugin')}  site ${printable(status.siteId)}, version ${printable(status.version)}\nRecovery site  ${peerText.join(', ')}\n${discards}`
  if (vpgs.length === 0) return `${head}No VPG. Make one with: pvecdp vpg create NAME --vm ID...\n`
  return head + vpgs.map((vpg) => `\n${pluginVpgText(vpg, paint, nowUnixMs)}`).join('')
}

const pluginVpgText = (vpg: VpgStatus, paint: Painter, nowUnixMs: number): string => {
  const last = vpg.lastCheckpoint === undefined ? 'none yet' : `${printable(vpg.lastCheckpoint.id)}, ${moment(vpg.lastCheckpoint.atUnixMs, nowUnixMs)}`
  const rpo = show(rpoCell(vpg.rpoMs, vpg.checkpointEveryMs), paint)
  const abandoned = vpg.abandonedCuts > 0 ? `; ${vpg.abandonedCuts} abandoned` : ''
  const head = [
    `${paint('bold', `VPG ${vpg.name}`)}  ${show(stateCell(vpg.state), paint)}: ${printable(vpg.reason)}`,
    `  RPO ${rpo}, a checkpoint every ${formatDuration(vpg.checkpointEveryMs)}, last one ${last}${abandoned}`,
  ]
  const nodes = new Set(vpg.vms.map(({ node }) => node)).size > 1
  const columns = [
    { title: 'VM', align: 'right' as const },
    ...(nodes ? [{ title: 'NODE' }] : []),
    { title: 'STATE' },
    { title: 'SINCE' },
    { title: 'DURABLE', align: 'right' as const },
    { title: 'BEHIND', align: 'right' as const },
    { title: 'BUFFER', align: 'right' as const },
    { title: 'ACK p50/p99/max', align: 'right' as const },
    { title: 'DISKS' },
    { title: 'REASON' },
  ]
  const rows = vpg.vms.map((vm): Cell[] => [
    String(vm.vmId),
    ...(nodes ? [printable(vm.node ?? '-')] : []),
    stateCell(vm.state),
    formatAge(vm.sinceUnixMs, nowUnixMs),
    String(vm.durableSeq),
    String(Math.max(0, vm.receivedSeq - vm.durableSeq)),
    formatBytes(vm.bufferedBytes + (vm.spilledBytes ?? 0)),
    [vm.ackLatencyUs.p50, vm.ackLatencyUs.p99, vm.ackLatencyUs.max].map(formatMicroseconds).join(' / '),
    vm.disks.map((disk) => `${printable(disk.key)} ${formatBytes(disk.sizeBytes)}`).join(', '),
    printable(vm.reason),
  ])
  const syncs = vpg.vms.flatMap((vm) => (vm.sync === undefined ? [] : [`  VM ${vm.vmId}: ${syncText(vm.sync)}\n`]))
  const verifies = vpg.vms.flatMap((vm) => (vm.verify === undefined ? [] : [`  VM ${vm.vmId}: ${verifyText(vm.verify, nowUnixMs)}\n`]))
  const joins = vpg.vms.flatMap((vm) => (vm.joining === undefined ? [] : [`  VM ${vm.vmId}: ${joiningText(vm.joining)}\n`]))
  const rounds = vpg.vms.flatMap((vm) => (vm.rounds === undefined ? [] : [`  VM ${vm.vmId}: ${roundsText(vm.rounds, nowUnixMs)}\n`]))
  const holds = vpg.vms.flatMap((vm) => (vm.holds ?? []).map((hold) => `  VM ${vm.vmId}: ${holdText(hold)}\n`))
  return `${head.join('\n')}\n${rows.length === 0 ? '' : formatTable(columns, rows, paint, '  ')}${syncs.join('')}${joins.join('')}${verifies.join('')}${rounds.join('')}${holds.join('')}`
}

/** "first copy of scsi1 beside checkpoints, which lack it until then: 12 GiB of 32 GiB (38 %)". */
export const joiningText = ({ keys, doneBytes, totalBytes, failed }: NonNullable<VmStatus['joining']>): string => {
  const done = failed === undefined || doneBytes > 0 ? `${formatBytes(doneBytes)} of ${formatBytes(totalBytes)} (${totalBytes === 0 ? 100 : Math.floor((100 * doneBytes) / totalBytes)} %)` : 'waits for its next try'
  return `first copy of ${printable(keys.join(', '))} beside checkpoints, which lack it until then: ${done}${failed === undefined ? '' : `; the last try ended: ${printable(failed)}`}`
}

/** "12 rounds under the backup, the newest 2026-11-23T07:10:00+01:00 (8 s ago)". */
export const roundsText = ({ count, lastUnixMs }: NonNullable<VmStatus['rounds']>, nowUnixMs: number): string =>
  lastUnixMs === undefined ? 'the first round under the backup is under way' : `${count} round${count === 1 ? '' : 's'} under the backup, the newest ${moment(lastUnixMs, nowUnixMs)}`

/** "held suspended by qm (resize) until 2026-11-23T07:10:00+01:00". */
export const holdText = ({ owner, reason, untilUnixMs }: Hold): string => `held suspended by ${printable(owner)} (${printable(reason)}) until ${formatTime(untilUnixMs)}`

/** "initial sync, 12 GiB of 32 GiB (38 %), 120 MiB/s, about 2 min 50 s left". */
export const syncText = (sync: NonNullable<VmStatus['sync']>): string => {
  const percent = sync.totalBytes === 0 ? 100 : Math.floor((100 * sync.doneBytes) / sync.totalBytes)
  const left = sync.secondsLeft === null ? 'time left unknown' : `about ${formatDuration(sync.secondsLeft * 1000)} left`
  const done = `${formatBytes(sync.doneBytes)} of ${formatBytes(sync.totalBytes)} (${percent} %)`
  const sent = sync.sentBytes === undefined ? '' : `, ${formatBytes(sync.sentBytes)} sent`
  return `${printable(sync.kind)} sync, ${done}${sent}, ${formatBytes(sync.rateBytesPerSec)}/s, ${left}`
}

/** "verified 2 d ago, no difference", "verify found 64 KiB that differ, 5 min ago". */
export const verifyText = ({ running, last }: NonNullable<VmStatus['verify']>, nowUnixMs: number): string => {
  const parts: string[] = []
  if (running !== undefined) parts.push(`verify runs, ${formatBytes(running.comparedBytes)} of ${formatBytes(running.totalBytes)} read`)
  if (last !== undefined) {
    const found = last.differingBytes === 0 ? 'no difference' : `${formatBytes(last.differingBytes)} differed`
    const undecided = last.undecidedBytes === 0 ? '' : `, ${formatBytes(last.undecidedBytes)} undecided`
    const ever = last.foundEver === 0 ? '' : `; ${last.foundEver} found a difference so far`
    parts.push(`verified ${moment(last.atUnixMs, nowUnixMs)}: ${found}${undecided}${ever}`)
  }
  return parts.join('; ')
}

export const agentStatusText = (status: AgentStatus, vpgs: AgentVpg[], paint: Painter, nowUnixMs: number): string => {
  const head = `${paint('bold', 'Agent')}  site ${printable(status.siteId)}, version ${printable(status.version)}\n`
  const sites = status.sites.map(
    (site) =>
      `Protected site ${printable(site.siteId)}  ${show(linkCell(site.connected), paint)}${site.address === undefined ? '' : `, ${printable(site.address)}`}\n`,
  )
  const paired = status.sites.length === 0 ? 'No site is paired. Make a token with: pvecdp pair token\n' : sites.join('')
  return head + paired + vpgs.map((vpg) => `\n${agentVpgText(vpg, paint, nowUnixMs)}`).join('')
}

const agentVpgText = (vpg: AgentVpg, paint: Painter, nowUnixMs: number): string => {
  const last =
    vpg.lastValidCheckpoint === undefined
      ? 'none valid yet'
      : `newest valid ${printable(vpg.lastValidCheckpoint.id)}, ${moment(vpg.lastValidCheckpoint.atUnixMs, nowUnixMs)}`
  const oldest = vpg.oldestAtUnixMs === undefined ? '' : `, oldest ${moment(vpg.oldestAtUnixMs, nowUnixMs)}`
  const title = `${paint('bold', `VPG ${vpg.name}`)}  of site ${printable(vpg.siteId)}`
  const head = `${title}\n  RPO ${show(rpoCell(vpg.rpoMs), paint)}, ${vpg.checkpoints} checkpoints, ${last}${oldest}\n`
  const columns = [
    { title: 'VM', align: 'right' as const },
    { title: 'STREAM' },
    { title: 'BASE' },
    { title: 'EPOCH', align: 'right' as const },
    { title: 'DURABLE', align: 'right' as const },
    { title: 'JOURNAL', align: 'right' as const },
  ]
  const rows = vpg.vms.map((vm): Cell[] => [
    String(vm.vmId),
    linkCell(vm.connected),
    { text: vm.baseComplete ? 'complete' : 'incomplete', style: vm.baseComplete ? 'green' : 'yellow' },
    String(vm.epoch),
    String(vm.durableSeq),
    formatBytes(vm.journalBytes),
  ])
  return head + formatTable(columns, rows, paint, '  ')
}
