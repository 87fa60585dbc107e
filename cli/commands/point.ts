import type { Command } from 'commander'
import { agentApi } from '../../core/api/index.ts'
import type { RecoveryPoint } from '../../core/api/index.ts'
import type { Context } from '../context.ts'
import { formatTable } from '../format/table.ts'
import type { Painter } from '../format/table.ts'
import { formatAge, formatBytes, formatTime, printable } from '../format/units.ts'
import { parseCheckpoint, parsePointId, parseVpgName } from '../input/parse.ts'

export const addPointCommands = (program: Command, context: (command: Command) => Context): void => {
  const point = program.command('point').description('recovery points: the disks of a group as of a checkpoint, read-only over NBD')

  point
    .command('open')
    .description('serve the disks as of a checkpoint')
    .argument('<vpg>')
    .argument('<checkpoint>', 'an id, latest, latest-tagged, or a time: the newest checkpoint not after it')
    .option('--accept-damaged', 'also a checkpoint that needs something damaged: reading that fails, all else is whole')
    .action(async (vpg: string, checkpoint: string, options: { acceptDamaged?: boolean }, command: Command) => {
      const { client, io, paint, print } = context(command)
      const body = { vpg: parseVpgName(vpg), checkpoint: parseCheckpoint(checkpoint, io.nowUnixMs()), ...(options.acceptDamaged === true ? { acceptDamaged: true } : {}) }
      const answer = await client('agent').call(agentApi.openPoint, { body }, { signal: io.signal })
      print(answer, () => `${pointText(answer, paint, io.nowUnixMs())}Close it with: pvecdp point close ${printable(answer.pointId)}\n`)
    })

  point
    .command('list')
    .description('the open recovery points')
    .action(async (_options: object, command: Command) => {
      const { client, io, paint, print } = context(command)
      const answer = await client('agent').call(agentApi.listPoints, {}, { signal: io.signal })
      print(answer, () =>
        answer.points.length === 0 ? 'No recovery point is open.\n' : answer.points.map((each) => pointText(each, paint, io.nowUnixMs())).join('\n'),
      )
    })

  point
    .command('close')
    .description('stop serving a recovery point; whatever still reads it gets an error')
    .argument('<id>')
    .action(async (id: string, _options: object, command: Command) => {
      const { client, io, print } = context(command)
      await client('agent').call(agentApi.closePoint, { params: { id: parsePointId(id) } }, { signal: io.signal })
      print({ closed: id }, () => `Recovery point ${id} is closed.\n`)
    })
}

const pointText = (point: RecoveryPoint, paint: Painter, nowUnixMs: number): string => {
  const when = `${formatTime(point.atUnixMs, { milliseconds: true })} (${formatAge(point.atUnixMs, nowUnixMs)})`
  const head = `Recovery point ${paint('bold', printable(point.pointId))}: VPG ${point.vpg} at ${when}, checkpoint ${printable(point.checkpointId)}\n`
  const columns = [{ title: 'VM', align: 'right' as const }, { title: 'DISK' }, { title: 'SIZE', align: 'right' as const }, { title: 'NBD URI' }]
  return (
    head +
    formatTable(
      columns,
      point.disks.map((disk) => [String(disk.vmId), printable(disk.key), formatBytes(disk.sizeBytes), printable(disk.uri)]),
      paint,
      '  ',
    )
  )
}
