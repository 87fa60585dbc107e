import { Command } from 'commander'
import { packageVersion } from '../core/api/index.ts'
import { addCheckpointCommands } from './commands/checkpoint.ts'
import { addEventsCommand } from './commands/events.ts'
import { addPairCommands } from './commands/pair.ts'
import { addPointCommands } from './commands/point.ts'
import { addReplicaCommands } from './commands/replica.ts'
import { addRetentionCommands } from './commands/retention.ts'
import { addScrubCommands } from './commands/scrub.ts'
import { addStatusCommand } from './commands/status.ts'
import { addSyncCommands } from './commands/sync.ts'
import { addVmCommands } from './commands/vm.ts'
import { addVpgCommands } from './commands/vpg.ts'
import { createContext } from './context.ts'
import type { Context, GlobalOptions } from './context.ts'
import type { CliIo } from './io.ts'

export const createProgram = (io: CliIo, exitWith: (code: number) => void): Command => {
  const program = new Command('pvecdp')
    .description('Continuous data protection for Proxmox VE, on either side.')
    .version(packageVersion(), '-V, --version', 'print the version')
    .option('--json', 'answer as JSON, errors too')
    .option('--plugin-socket <path>', 'socket of the plugin (PVECDP_PLUGIN_SOCKET; /run/pve-cdp/plugin.sock)')
    .option('--agent-socket <path>', 'socket of the agent (PVECDP_AGENT_SOCKET; /run/pve-cdp/agent.sock)')
    .addHelpText('after', '\nExit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 a daemon does not answer.')
  const context = (command: Command): Context => createContext(io, command.optsWithGlobals<GlobalOptions>())
  addStatusCommand(program, context, exitWith)
  addVpgCommands(program, context)
  addVmCommands(program, context)
  addCheckpointCommands(program, context)
  addSyncCommands(program, context)
  addPointCommands(program, context)
  addReplicaCommands(program, context)
  addRetentionCommands(program, context)
  addScrubCommands(program, context)
  addEventsCommand(program, context)
  addPairCommands(program, context)
  for (const command of [program, ...descendants(program)]) {
    command.exitOverride().configureOutput({ writeOut: (text) => void io.stdout.write(text), writeErr: () => undefined, getOutHasColors: () => io.color })
  }
  return program
}

const descendants = (command: Command): Command[] => command.commands.flatMap((child) => [child, ...descendants(child)])
