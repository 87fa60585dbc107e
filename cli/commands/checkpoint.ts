import type { Command } from 'commander'
import { agentApi, pluginApi } from '../../core/api/index.ts'
import type { Checkpoint } from '../../core/api/index.ts'
import type { Context } from '../context.ts'
import { formatTable } from '../format/table.ts'
import type { Style } from '../format/table.ts'
import { formatAge, formatTime, printable } from '../format/units.ts'
import { parseLimit, parseTag, parseTime, parseVpgName } from '../input/parse.ts'
import { UsageError } from '../input/usage-error.ts'

const stateStyles: Record<Checkpoint['state'], Style> = { proved: 'green', valid: 'green', pending: 'yellow', suspect: 'red', damaged: 'red' }

export const addCheckpointCommands = (program: Command, context: (command: Command) => Context): void => {
  const checkpoint = program.command('checkpoint').description('consistent moments in the history of a group')

  checkpoint
    .command('list')
    .description('the newest checkpoints at the recovery site, newest first')
    .argument('<vpg>')
    .option('--limit <n>', 'how many', '20')
    .option('--from <time>', 'not before, for example 2026-11-23T07:04, 07:04, 10m-ago')
    .option('--to <time>', 'not after')
    .action(async (vpg: string, options: { limit: string; from?: string; to?: string }, command: Command) => {
      const { client, io, paint, print } = context(command)
      const nowUnixMs = io.nowUnixMs()
      const fromUnixMs = options.from === undefined ? undefined : parseTime(options.from, nowUnixMs)
      const toUnixMs = options.to === undefined ? undefined : parseTime(options.to, nowUnixMs)
      if (fromUnixMs !== undefined && toUnixMs !== undefined && fromUnixMs > toUnixMs)
        throw new UsageError('--from is after --to', `They are ${formatTime(fromUnixMs)} and ${formatTime(toUnixMs)}: exchange them.`)
      const query = { limit: parseLimit(options.limit), ...(fromUnixMs === undefined ? {} : { fromUnixMs }), ...(toUnixMs === undefined ? {} : { toUnixMs }) }
      const answer = await client('agent').call(agentApi.listCheckpoints, { params: { name: parseVpgName(vpg) }, query }, { signal: io.signal })
      print(answer, () => {
        if (answer.checkpoints.length === 0)
          return `VPG ${vpg} has no checkpoint${fromUnixMs === undefined && toUnixMs === undefined ? ' yet' : ' in that time'}.\n`
        const columns = [
          { title: 'CHECKPOINT' },
          { title: 'TIME' },
          { title: 'AGE', align: 'right' as const },
          { title: 'STATE' },
          { title: 'KIND' },
          { title: 'TAG' },
        ]
        const rows = answer.checkpoints.map((each) => [
          printable(each.id),
          formatTime(each.atUnixMs, { milliseconds: true }),
          formatAge(each.atUnixMs, nowUnixMs),
          { text: each.state, style: stateStyles[each.state] },
          each.kind,
          printable(each.tag ?? ''),
        ])
        return formatTable(columns, rows, paint)
      })
    })

  checkpoint
    .command('tag')
    .description('cut a checkpoint now and give it a name')
    .argument('<vpg>')
    .argument('<text>')
    .action(async (vpg: string, text: string, _options: object, command: Command) => {
      const { client, io, print } = context(command)
      const request = { params: { name: parseVpgName(vpg) }, body: { tag: parseTag(text) } }
      const answer = await client('plugin').call(pluginApi.tagCheckpoint, request, { signal: io.signal })
      print(answer, () => {
        const what = `Checkpoint ${printable(answer.checkpointId)} of VPG ${vpg} at ${formatTime(answer.atUnixMs, { milliseconds: true })}`
        const until = answer.state === 'pending' ? ' until the recovery site holds it' : ''
        return `${what} is tagged "${printable(request.body.tag)}"; it is ${answer.state}${until}.\n`
      })
    })
}
