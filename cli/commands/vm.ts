import type { Command } from 'commander'
import { pluginApi } from '../../core/api/index.ts'
import type { Suspended } from '../../core/api/index.ts'
import type { Context } from '../context.ts'
import { printable } from '../format/units.ts'
import { parseHoldTime, parseOwner, parseReason, parseVmIds } from '../input/parse.ts'
import { holdText } from './status-text.ts'

/** Taking capture out may have to wait for Proxmox's own commands to the VM. */
const SUSPEND_DEADLINE_MS = 30_000

const vmIdOf = (text: string): string => String(parseVmIds([text])[0])

const nowText = ({ vmId, state, reason, holds }: Suspended): string =>
  `VM ${vmId} is ${printable(state)}: ${printable(reason)}\n${holds.map((hold) => `  ${holdText(hold)}\n`).join('')}`

export const addVmCommands = (program: Command, context: (command: Command) => Context): void => {
  const vm = program.command('vm').description('one protected VM, on the node where it runs')

  vm
    .command('suspend')
    .description('take capture out of a VM for a while, so that a snapshot, resize, disk move or unplug works; nothing is lost')
    .argument('<id>')
    .requiredOption('--owner <name>', 'who asks; holds of different owners are independent')
    .requiredOption('--reason <text>', 'why, for the history')
    .option('--for <duration>', 'after this it ends by itself', '10m')
    .action(async (id: string, options: { owner: string; reason: string; for: string }, command: Command) => {
      const { client, io, print } = context(command)
      const body = { owner: parseOwner(options.owner), reason: parseReason(options.reason), forMs: parseHoldTime(options.for) }
      const answer = await client('plugin').call(pluginApi.suspendVm, { params: { vmId: vmIdOf(id) }, body }, { deadlineMs: SUSPEND_DEADLINE_MS, signal: io.signal })
      print(answer, () => `${nowText(answer)}Let go of it with: pvecdp vm resume ${answer.vmId} --owner ${printable(body.owner)}\n`)
    })

  vm
    .command('resume')
    .description('let go of a suspension; capture begins again when nobody holds it')
    .argument('<id>')
    .requiredOption('--owner <name>', 'who had asked')
    .action(async (id: string, options: { owner: string }, command: Command) => {
      const { client, io, print } = context(command)
      const owner = parseOwner(options.owner)
      const answer = await client('plugin').call(pluginApi.resumeVm, { params: { vmId: vmIdOf(id) }, body: { owner } }, { signal: io.signal })
      print(answer, () => `${answer.held ? '' : `${printable(owner)} held nothing.\n`}${nowText(answer)}`)
    })
}
