import type { Command } from 'commander'
import { pluginApi } from '../../core/api/index.ts'
import type { Context } from '../context.ts'
import { parseVmIds, parseVpgName } from '../input/parse.ts'

/** "sync force" and "verify": the protected site compared with the recovery site. */
export const addSyncCommands = (program: Command, context: (command: Command) => Context): void => {
  program
    .command('sync')
    .description('copies from the protected to the recovery site')
    .command('force')
    .description('compare with the recovery site again and send what differs; no checkpoint is cut meanwhile')
    .argument('<vpg>')
    .option('--vm <id>', 'this VM only')
    .action(async (vpg: string, options: { vm?: string }, command: Command) => {
      const { client, io, print } = context(command)
      const request = requestOf(vpg, options)
      const { vmIds } = await client('plugin').call(pluginApi.forceSync, request, { signal: io.signal })
      print({ vmIds }, () => `VM ${vmIds.join(', ')} of VPG ${vpg} ${vmIds.length === 1 ? 'is' : 'are'} compared with the recovery site.\nWatch it with: pvecdp status ${vpg}\n`)
    })

  program
    .command('verify')
    .description('check that the recovery site holds what the disks hold; what differs is reported and synced')
    .argument('<vpg>')
    .option('--vm <id>', 'this VM only')
    .action(async (vpg: string, options: { vm?: string }, command: Command) => {
      const { client, io, print } = context(command)
      const request = requestOf(vpg, options)
      const { vmIds } = await client('plugin').call(pluginApi.verify, request, { signal: io.signal })
      print({ vmIds }, () => `VM ${vmIds.join(', ')} of VPG ${vpg} ${vmIds.length === 1 ? 'is' : 'are'} being verified.\nSee what it finds with: pvecdp status ${vpg}, pvecdp events --follow\n`)
    })
}

const requestOf = (vpg: string, { vm }: { vm?: string }) => ({ params: { name: parseVpgName(vpg) }, body: vm === undefined ? {} : { vmId: parseVmIds([vm])[0] } })
