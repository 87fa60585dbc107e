import type { Command } from 'commander'
import type { ApiEvent } from '../../core/api/index.ts'
import { CdpError, toCdpError } from '../../core/errors/index.ts'
import { askBoth, isAbsent, sides } from '../context.ts'
import type { Context, Side } from '../context.ts'
import type { Painter } from '../format/table.ts'
import { formatTime, printable } from '../format/units.ts'
import { parseLimit } from '../input/parse.ts'
import { UsageError } from '../input/usage-error.ts'

export const addEventsCommand = (program: Command, context: (command: Command) => Context): void => {
  program
    .command('events')
    .description('what happened, oldest first; of both daemons, whichever run here')
    .option('-f, --follow', 'go on with what happens from now on')
    .option('--limit <n>', 'how many of the kept events', '100')
    .option('--side <side>', 'plugin or agent only')
    .action(async (options: { follow?: boolean; limit: string; side?: string }, command: Command) => {
      const own = context(command)
      const limit = parseLimit(options.limit)
      const which = parseSides(options.side)
      const print = (side: Side, event: ApiEvent): void =>
        void own.io.stdout.write(own.json ? `${JSON.stringify({ side, ...event })}\n` : eventText(side, event, own.paint))
      if (options.follow === true) await follow(own, which, limit, print)
      else {
        const { answers } = await askBoth(own, which, async (side, client) => {
          const events: [Side, ApiEvent][] = []
          for await (const event of client.events({ follow: false, limit }, { signal: own.io.signal })) events.push([side, event])
          return events
        })
        const merged = [...answers.values()].flat().sort(([, one], [, other]) => one.atUnixMs - other.atUnixMs)
        for (const [side, event] of merged.slice(-limit)) print(side, event)
      }
    })
}

const follow = async (context: Context, which: readonly Side[], limit: number, print: (side: Side, event: ApiEvent) => void): Promise<void> => {
  const { signal } = context.io
  await askBoth(context, which, async (side, client) => {
    try {
      for await (const event of client.events({ follow: true, limit }, { signal })) print(side, event)
    } catch (error) {
      // The other side may go on for days: this one's failure is told now.
      if (which.length > 1 && !isAbsent(error)) tell(context, side, toCdpError(error))
      throw error
    }
  })
  if (!signal.aborted)
    throw new CdpError('UNREACHABLE', 'the daemon stopped', {
      hint: 'Call "pvecdp status" to see what runs.',
      context: { socketPath: which.map((side) => context.socketPath(side)).join(', ') },
    })
}

const tell = ({ io, json }: Context, side: Side, error: CdpError): void => {
  if (json) io.stdout.write(`${JSON.stringify({ side, error })}\n`)
  else io.stderr.write(`error: ${printable(error.message)}\n`)
}

const parseSides = (side: string | undefined): readonly Side[] => {
  if (side === undefined) return sides
  if (side !== 'plugin' && side !== 'agent') throw new UsageError(`"${side}" is not a side`, 'Give plugin or agent.')
  return [side]
}

const levelStyles = { info: 'dim', warn: 'yellow', error: 'red' } as const

const eventText = (side: Side, event: ApiEvent, paint: Painter): string => {
  const context = Object.entries(event.context).map(([key, value]) => ` ${printable(key)}=${printable(String(value))}`)
  const head = [formatTime(event.atUnixMs, { milliseconds: true }), side.padEnd(6), paint(levelStyles[event.level], event.level.padEnd(5))]
  return `${head.join(' ')} ${printable(event.kind)}: ${printable(event.message)}${paint('dim', context.join(''))}\n`
}
