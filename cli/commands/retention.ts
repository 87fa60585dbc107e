import { Option } from 'commander'
import type { Command } from 'commander'
import { agentApi } from '../../core/api/index.ts'
import type { Retention } from '../../core/api/index.ts'
import type { Context } from '../context.ts'
import { formatTable } from '../format/table.ts'
import type { Painter } from '../format/table.ts'
import { formatAge, formatBytes, formatDuration, formatTime, printable } from '../format/units.ts'
import { parseVpgName } from '../input/parse.ts'

export const addRetentionCommands = (program: Command, context: (command: Command) => Context): void => {
  const retention = program.command('retention').description('how much history a group has at the recovery site, and what limits it')

  retention
    .command('show')
    .description('from when to when a group can be recovered, and why not further')
    .argument('<vpg>')
    .action(async (vpg: string, _options: object, command: Command) => {
      const { client, io, paint, print } = context(command)
      const answer = await client('agent').call(agentApi.showRetention, { params: { name: parseVpgName(vpg) } }, { signal: io.signal })
      print(answer, () => retentionText(answer, paint, io.nowUnixMs()))
    })

  retention
    .command('set')
    .description('choose, for one group, over what the agent is configured with')
    .argument('<vpg>')
    .addOption(new Option('--sync-overflow <choice>', 'what becomes of a sync that would not fit the limit of a journal: grow (up to the hard stop), pause, give-up (history, down to a last tagged checkpoint)').choices(['grow', 'pause', 'give-up'] as const).makeOptionMandatory())
    .action(async (vpg: string, options: { syncOverflow: Retention['policy']['syncOverflow'] }, command: Command) => {
      const { client, io, print } = context(command)
      const answer = await client('agent').call(agentApi.setRetention, { params: { name: parseVpgName(vpg) }, body: { syncOverflow: options.syncOverflow } }, { deadlineMs: 60_000, signal: io.signal })
      print(answer, () => `VPG ${answer.vpg}: ${overflowText(answer.policy)}\n`)
    })
}

const overflowText = ({ syncOverflow }: Retention['policy']): string =>
  `a sync that would not fit the limit ${syncOverflow === 'grow' ? 'grows beyond it, up to the hard stop' : syncOverflow === 'pause' ? 'is paused' : 'makes history go, down to a last tagged checkpoint'} (${syncOverflow}).`

const why: Record<Retention['limitedBy'], string> = {
  filling: 'it is still filling',
  time: 'older history goes, as configured',
  size: 'the limit of a journal makes it shorter',
  reserve: 'free space below its reserve makes it shorter',
  pin: 'something that is open holds it longer',
  damage: 'damage in a journal holds it',
  'no-checkpoint': 'there is no checkpoint that it could move to',
}

const limitText = ({ journalLimitBytes, hardStopBytes }: Retention['policy']): string =>
  journalLimitBytes === null ? 'no limit of size' : `at most ${formatBytes(journalLimitBytes)} a VM${hardStopBytes === null ? '' : `, hard stop at ${formatBytes(hardStopBytes)}`}`

const retentionText = (answer: Retention, paint: Painter, nowUnixMs: number): string => {
  const { from, to, policy, space, promotion } = answer
  const range =
    from === undefined || to === undefined
      ? `VPG ${answer.vpg} cannot be recovered yet: it has no valid checkpoint.\n`
      : `VPG ${paint('bold', answer.vpg)} can be recovered from ${formatTime(from.atUnixMs)} (${formatAge(from.atUnixMs, nowUnixMs)}) to ${formatTime(to.atUnixMs)} (${formatAge(to.atUnixMs, nowUnixMs)}), ${answer.checkpoints} checkpoints.\n`
  const lines = [
    `History is ${formatDuration(answer.lengthMs)} of ${formatDuration(policy.historyMs)}: ${why[answer.limitedBy]}; ${limitText(policy)}.\n`,
    ...(policy.journalLimitBytes === null ? [] : [`There, ${overflowText(policy)}\n`]),
    `Free space is ${formatBytes(space.freeBytes)}; ${formatBytes(space.reserveBytes)} are kept in reserve.\n`,
    ...(promotion === null ? [] : [`Promoting VM ${promotion.vmId} to ${formatTime(promotion.toUnixMs)}: ${formatBytes(promotion.doneBytes)} of ${formatBytes(promotion.totalBytes)}.\n`]),
    ...answer.pins.map((pin) => `Held by ${printable(pin.reason)} (VM ${pin.vmId}) since ${formatTime(pin.sinceUnixMs)}.\n`),
    ...answer.alarms.map((alarm) => `${paint(alarm.level === 'error' ? 'red' : 'yellow', alarm.level)} ${printable(alarm.id)}: ${printable(alarm.message)}, since ${formatTime(alarm.sinceUnixMs)}.\n`),
  ]
  const columns = [{ title: 'VM', align: 'right' as const }, { title: 'JOURNAL', align: 'right' as const }, { title: 'STATE' }]
  const rows = answer.vms.map((vm) => [String(vm.vmId), formatBytes(vm.journalBytes), { text: printable(vm.condition), style: vm.condition === 'open' ? ('green' as const) : ('red' as const) }])
  return range + lines.join('') + formatTable(columns, rows, paint, '  ')
}
