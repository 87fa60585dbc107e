import type { Command } from 'commander'
import { agentApi } from '../../core/api/index.ts'
import type { Scrub } from '../../core/api/index.ts'
import type { Context } from '../context.ts'
import { formatTable } from '../format/table.ts'
import type { Painter } from '../format/table.ts'
import { formatBytes, formatDuration, formatTime, printable } from '../format/units.ts'
import { parseVmIds } from '../input/parse.ts'

export const addScrubCommands = (program: Command, context: (command: Command) => Context): void => {
  const scrub = program
    .command('scrub')
    .description('read again what the recovery site keeps, and compare it with its checksums')
    .argument('[vm]', 'this VM only')
    .action(async (vm: string | undefined, _options: object, command: Command) => {
      const { client, io, print } = context(command)
      const body = vm === undefined ? {} : { vmId: parseVmIds([vm])[0] }
      const answer = await client('agent').call(agentApi.startScrub, { body }, { signal: io.signal })
      print(answer, () => (answer.vmIds.length === 0 ? 'There is nothing to scrub: no VM has a replica here.\n' : `VM ${answer.vmIds.join(', ')} ${answer.vmIds.length === 1 ? 'is' : 'are'} being scrubbed.\nWatch it with: pvecdp scrub show\n`))
    })

  scrub
    .command('show')
    .description('how far the scrub is, and what it found')
    .action(async (_options: object, command: Command) => {
      const { client, io, paint, print } = context(command)
      const answer = await client('agent').call(agentApi.showScrub, {}, { signal: io.signal })
      print(answer, () => scrubText(answer, paint))
    })
}

type ScrubbedVm = Scrub['vms'][number]

const stateOf = ({ running }: ScrubbedVm): string => (running === undefined ? '' : `${formatBytes(running.readBytes)} of ${formatBytes(running.totalBytes)}`)
const lastOf = ({ last }: ScrubbedVm): string => (last === undefined ? 'never' : formatTime(last.endedAtUnixMs))

const damageText = ({ vmId, damage, checkpoints, isHopeless }: ScrubbedVm, paint: Painter): string => {
  const lines = damage.map(({ what, foundAtUnixMs, healed }) => `VM ${vmId}: ${paint(healed ? 'yellow' : 'red', healed ? 'damaged, written again since' : 'damaged')}: ${printable(what)}; found ${formatTime(foundAtUnixMs)}.\n`)
  if (checkpoints !== undefined) {
    lines.push(`VM ${vmId}: ${checkpoints.count} checkpoints of VPG ${checkpoints.vpg} need what is damaged, from ${formatTime(checkpoints.oldest.atUnixMs)} to ${formatTime(checkpoints.newest.atUnixMs)}.\n`)
  }
  if (isHopeless) lines.push(`VM ${vmId}: nobody knows what a part of the damage was about, so no sync mends it. Delete the replica and begin anew to have a history again.\n`)
  return lines.join('')
}

const scrubText = ({ everyMs, rateBytesPerSec, vms }: Scrub, paint: Painter): string => {
  const how = `${everyMs === 0 ? 'Only when asked for' : `Every ${formatDuration(everyMs)}`}, at most ${formatBytes(rateBytesPerSec)}/s.\n`
  const columns = [{ title: 'VM', align: 'right' as const }, { title: 'LAST' }, { title: 'NOW' }, { title: 'DAMAGE' }]
  const rows = vms.map((vm) => {
    const open = vm.damage.filter(({ healed }) => !healed).length
    const text = vm.damage.length === 0 ? 'none' : open === 0 ? `${vm.damage.length} healed` : `${open} of ${vm.damage.length} open`
    return [String(vm.vmId), lastOf(vm), stateOf(vm), { text, style: vm.damage.length === 0 ? ('green' as const) : open === 0 ? ('yellow' as const) : ('red' as const) }]
  })
  return how + formatTable(columns, rows, paint) + vms.map((vm) => damageText(vm, paint)).join('')
}
