import type { Command } from 'commander'
import { agentApi, pluginApi } from '../../core/api/index.ts'
import type { AgentStatus, PluginStatus } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import { askBoth, sides } from '../context.ts'
import type { Context } from '../context.ts'
import { parseVpgName } from '../input/parse.ts'
import { printable } from '../format/units.ts'
import { agentStatusText, pluginStatusText } from './status-text.ts'

export const addStatusCommand = (program: Command, context: (command: Command) => Context, exitWith: (code: number) => void): void => {
  program
    .command('status')
    .description('what is protected, how far behind, and why; of both daemons, whichever run here')
    .argument('[vpg]')
    .action(async (name: string | undefined, _options: object, command: Command) => {
      const { io, json, paint } = context(command)
      const wanted = name === undefined ? undefined : parseVpgName(name)
      const { answers, failures } = await askBoth<PluginStatus | AgentStatus>(context(command), sides, (side, client) =>
        side === 'plugin' ? client.call(pluginApi.status, {}, { signal: io.signal }) : client.call(agentApi.status, {}, { signal: io.signal }),
      )
      const plugin = answers.get('plugin') as PluginStatus | undefined
      const agent = answers.get('agent') as AgentStatus | undefined
      const pluginVpgs = (plugin?.vpgs ?? []).filter((vpg) => wanted === undefined || vpg.name === wanted)
      const agentVpgs = (agent?.vpgs ?? []).filter((vpg) => wanted === undefined || vpg.name === wanted)
      if (wanted !== undefined && pluginVpgs.length + agentVpgs.length === 0 && failures.size === 0) {
        throw new CdpError('NOT_FOUND', `there is no VPG ${wanted}`, { hint: 'See what there is with: pvecdp status', context: { vpg: wanted } })
      }
      if (json) {
        const errors = Object.fromEntries([...failures].map(([side, error]) => [side, error]))
        const ofPlugin = plugin === undefined ? null : { ...plugin, vpgs: pluginVpgs }
        const ofAgent = agent === undefined ? null : { ...agent, vpgs: agentVpgs }
        io.stdout.write(`${JSON.stringify({ plugin: ofPlugin, agent: ofAgent, errors })}\n`)
      } else {
        const parts: string[] = []
        const nowUnixMs = io.nowUnixMs()
        if (plugin !== undefined && (wanted === undefined || pluginVpgs.length > 0)) parts.push(pluginStatusText(plugin, pluginVpgs, paint, nowUnixMs))
        if (agent !== undefined && (wanted === undefined || agentVpgs.length > 0)) parts.push(agentStatusText(agent, agentVpgs, paint, nowUnixMs))
        io.stdout.write(parts.join('\n'))
        for (const error of failures.values())
          io.stderr.write(`error: ${printable(error.message)}\n${error.hint === undefined ? '' : `hint: ${printable(error.hint)}\n`}`)
      }
      if (failures.size > 0) exitWith(3)
    })
}
