import type { Command } from 'commander'
import { agentApi } from '../../core/api/index.ts'
import type { Replica } from '../../core/api/index.ts'
import type { Context } from '../context.ts'
import { formatTable } from '../format/table.ts'
import type { Style } from '../format/table.ts'
import { formatBytes, printable } from '../format/units.ts'
import { parseVmIds } from '../input/parse.ts'

const stateStyles: Record<Replica['state'], Style> = { protected: 'green', silent: 'yellow', left: 'yellow' }

export const addReplicaCommands = (program: Command, context: (command: Command) => Context): void => {
  const replica = program.command('replica').description('what the recovery site keeps of each VM')

  replica
    .command('list')
    .description('every replica, also of VMs that left their group ("left") and of those that are not heard of ("silent")')
    .action(async (_options: object, command: Command) => {
      const { client, io, paint, print } = context(command)
      const answer = await client('agent').call(agentApi.listReplicas, {}, { signal: io.signal })
      print(answer, () => {
        if (answer.replicas.length === 0) return 'There is no replica here.\n'
        const columns = [{ title: 'VM', align: 'right' as const }, { title: 'VPG' }, { title: 'STATE' }, { title: 'JOURNAL', align: 'right' as const }, { title: 'MIRROR', align: 'right' as const }, { title: 'CHECKPOINTS', align: 'right' as const }, { title: 'IN USE BY' }, { title: 'SITE' }]
        const rows = answer.replicas.map((one) => [
          String(one.vmId), printable(one.vpg ?? ''), { text: one.state, style: stateStyles[one.state] }, formatBytes(one.journalBytes), formatBytes(one.mirrorBytes), String(one.checkpoints), printable(one.readers.join(', ')), printable(one.siteId),
        ])
        return formatTable(columns, rows, paint)
      })
    })

  replica
    .command('delete')
    .description('delete the replica of a VM for good; refused while the VM is protected or something reads it')
    .argument('<vm>')
    .requiredOption('--confirm <vm>', 'the id of the VM once more')
    .option('--with-checkpoints', 'also if checkpoints need it: they are lost for every VM of their group')
    .option('--site <id>', 'the site of the VM, if several have one of that id')
    .action(async (vm: string, options: { confirm: string; withCheckpoints?: boolean; site?: string }, command: Command) => {
      const { client, io, print } = context(command)
      const [vmId] = parseVmIds([vm])
      const body = { vmId, confirm: options.confirm, ...(options.withCheckpoints === true ? { withCheckpoints: true } : {}), ...(options.site === undefined ? {} : { siteId: options.site }) }
      const answer = await client('agent').call(agentApi.deleteReplica, { body }, { deadlineMs: 600_000, signal: io.signal })
      print(answer, () => `The replica of VM ${vmId} is deleted${answer.checkpoints === 0 ? '' : `, and ${answer.checkpoints} checkpoints with it`}.\n`)
    })
}
