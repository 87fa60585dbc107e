import { CommanderError } from 'commander'
import { CdpError, toCdpError } from '../core/errors/index.ts'
import { printable } from './format/units.ts'
import { UsageError } from './input/usage-error.ts'
import type { CliIo } from './io.ts'
import { createProgram } from './program.ts'

type Failure = { exitCode: 1 | 2 | 3; error: { code: string; message: string; hint?: string; context: Record<string, unknown> } }

/** One run of pvecdp. `argv` without node and script. Never throws, never exits; the exit code is the result. */
export const runCli = async (argv: string[], io: CliIo): Promise<number> => {
  let exitCode = 0
  try {
    await createProgram(io, (code) => (exitCode = code)).parseAsync(argv, { from: 'user' })
    return exitCode
  } catch (error) {
    if (error instanceof CommanderError && error.exitCode === 0) return 0
    const failure = failureOf(error, argv)
    const { message, hint } = failure.error
    if (wantsJson(argv)) io.stdout.write(`${JSON.stringify({ error: failure.error })}\n`)
    else io.stderr.write(`error: ${printable(message)}\n${hint === undefined ? '' : `hint: ${printable(hint)}\n`}`)
    return failure.exitCode
  }
}

const wantsJson = (argv: string[]): boolean => argv.slice(0, argv.includes('--') ? argv.indexOf('--') : undefined).includes('--json')

const failureOf = (error: unknown, argv: string[]): Failure => {
  if (error instanceof UsageError) return usage(error.message, error.hint)
  if (error instanceof CommanderError) return commanderFailure(error, argv)
  const failure = toCdpError(error)
  const daemonAnswered = failure.context['socketPath'] === undefined
  const { code, message, hint, context } = failure.toJSON()
  const told = failure.code === 'INTERNAL' && !(error instanceof CdpError) ? 'This is a bug in pvecdp; please report it.' : hint
  return {
    exitCode: code === 'BAD_INPUT' ? 2 : (code === 'UNREACHABLE' || code === 'TIMEOUT') && !daemonAnswered ? 3 : 1,
    error: { code, message, ...(told === undefined ? {} : { hint: told }), context },
  }
}

const usage = (message: string, hint: string): Failure => ({ exitCode: 2, error: { code: 'BAD_INPUT', message, hint, context: {} } })

const commanderFailure = (error: CommanderError, argv: string[]): Failure => {
  const help = `See: pvecdp ${argv
    .filter((word) => /^[a-z]+$/.test(word))
    .slice(0, 2)
    .join(' ')} --help`.replaceAll('  ', ' ')
  if (error.code === 'commander.help') return usage('what is to be done was not said', help)
  const [first = '', suggestion] = error.message.replace(/^error: /, '').split('\n')
  return usage(first, suggestion === undefined ? help : suggestion.replaceAll(/[()]/g, ''))
}
