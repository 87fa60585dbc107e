import { Option } from 'commander'
import type { Command } from 'commander'
import { pluginApi } from '../../core/api/index.ts'
import type { VpgStatus } from '../../core/api/index.ts'
import type { Context } from '../context.ts'
import { formatTable } from '../format/table.ts'
import { formatDuration, printable } from '../format/units.ts'
import { parseCheckpointInterval, parseVmIds, parseVpgName } from '../input/parse.ts'
import { UsageError } from '../input/usage-error.ts'
import { rpoCell, stateCell } from './status-text.ts'

export const addVpgCommands = (program: Command, context: (command: Command) => Context): void => {
  const vpg = program.command('vpg').description('virtual protection groups: VMs that are recovered together')

  vpg
    .command('create')
    .description('protect VMs as one group; the initial sync begins at once')
    .argument('<name>')
    .option('--vm <id...>', 'the VMs')
    .option('--checkpoint-every <duration>', 'time between checkpoints', '5s')
    .addOption(new Option('--priority <priority>', 'whose data go first over a limited line').choices(['low', 'normal', 'high'] as const).default('normal' as const))
    .action(async (name: string, options: { vm?: string[]; checkpointEvery: string; priority: 'low' | 'normal' | 'high' }, command: Command) => {
      const { client, io, print } = context(command)
      if (options.vm === undefined) throw new UsageError('a VPG needs at least one VM', `For example: pvecdp vpg create ${name} --vm 101 102`)
      const body = { name: parseVpgName(name), vmIds: parseVmIds(options.vm), checkpointEveryMs: parseCheckpointInterval(options.checkpointEvery), priority: options.priority }
      const answer = await client('plugin').call(pluginApi.createVpg, { body }, { deadlineMs: 60_000, signal: io.signal })
      print(
        answer,
        () =>
          `VPG ${body.name} protects VM ${body.vmIds.join(', ')}; it is ${answer.state}: ${printable(answer.reason)}\n` +
          `Watch it with: pvecdp status ${body.name}\n`,
      )
    })

  vpg
    .command('list')
    .description('the groups of this site')
    .action(async (_options: object, command: Command) => {
      const { client, io, paint, print } = context(command)
      const answer = await client('plugin').call(pluginApi.listVpgs, {}, { signal: io.signal })
      print(answer, () => {
        if (answer.vpgs.length === 0) return 'No VPG. Make one with: pvecdp vpg create NAME --vm ID...\n'
        const columns = [
          { title: 'VPG' },
          { title: 'STATE' },
          { title: 'RPO', align: 'right' as const },
          { title: 'EVERY', align: 'right' as const },
          { title: 'VMS' },
          { title: 'REASON' },
        ]
        return formatTable(columns, answer.vpgs.map(row), paint)
      })
    })

  vpg
    .command('delete')
    .description('stop protecting a group; what the recovery site holds stays there')
    .argument('<name>')
    .action(async (name: string, _options: object, command: Command) => {
      const { client, io, print } = context(command)
      await client('plugin').call(pluginApi.deleteVpg, { params: { name: parseVpgName(name) } }, { deadlineMs: 60_000, signal: io.signal })
      print({ deleted: name }, () => `VPG ${name} is no longer protected. Its history stays at the recovery site.\n`)
    })
}

const row = (vpg: VpgStatus) => [
  vpg.name,
  stateCell(vpg.state),
  rpoCell(vpg.rpoMs, vpg.checkpointEveryMs),
  formatDuration(vpg.checkpointEveryMs),
  vpg.vms.map((vm) => vm.vmId).join(' '),
  printable(vpg.reason),
]
