import { hostname } from 'node:os'
import type { Command } from 'commander'
import { agentApi, pluginApi } from '../../core/api/index.ts'
import { errorMessage } from '../../core/errors/index.ts'
import { parseToken } from '../../core/pairing/index.ts'
import type { Context } from '../context.ts'
import { formatAge, formatTime, printable } from '../format/units.ts'
import { parseHost, parsePort } from '../input/parse.ts'
import { readSecret, readSecretFile } from '../input/read-secret.ts'
import { UsageError } from '../input/usage-error.ts'

export const addPairCommands = (program: Command, context: (command: Command) => Context): void => {
  const pair = program.command('pair').description('pair a protected site with a recovery site')

  pair
    .command('token')
    .description('make a one-time token on the recovery side; it is a secret, valid for 15 minutes')
    .option('--host <host>', 'name or address under which the protected site reaches this machine', hostname())
    .option('--port <port>', 'port of the agent, if it is reached through another one than it listens on')
    .action(async (options: { host: string; port?: string }, command: Command) => {
      const { client, io, print } = context(command)
      const body = { host: parseHost(options.host), ...(options.port === undefined ? {} : { port: parsePort(options.port) }) }
      const answer = await client('agent').call(agentApi.createPairingToken, { body }, { signal: io.signal })
      print(answer, () => {
        // The token alone goes to stdout, so that it can be piped to the other side.
        const until = `${formatTime(answer.expiresAtUnixMs)} (${formatAge(answer.expiresAtUnixMs, io.nowUnixMs())})`
        io.stderr.write(`Valid for one pairing, until ${until}, for ${body.host}.\nOn a node of the protected cluster call "pvecdp pair join" and paste it.\n`)
        return `${printable(answer.token)}\n`
      })
    })

  pair
    .command('join')
    .description('pair this site with the recovery site that made a token; the token is read from standard input')
    .argument('[-]', 'read standard input (the default); a token on the command line is refused, because other users can see it there')
    .option('--token-file <file>', 'read the token from a file')
    .action(async (dash: string | undefined, options: { tokenFile?: string }, command: Command) => {
      const { client, io, print } = context(command)
      if (dash !== undefined && dash !== '-')
        throw new UsageError(
          'a token on the command line can be seen by every user of this machine',
          'Call "pvecdp pair join" and paste it, or pipe it in, or use --token-file FILE.',
        )
      const token = (options.tokenFile === undefined ? await readSecret(io, 'Token: ') : await readSecretFile(options.tokenFile)).trim()
      try {
        parseToken(token)
      } catch (error) {
        throw new UsageError(errorMessage(error), 'Give the whole line that "pvecdp pair token" printed at the recovery site.')
      }
      const answer = await client('plugin').call(pluginApi.pair, { body: { token } }, { deadlineMs: 60_000, signal: io.signal })
      print(
        answer,
        () => `Paired with ${printable(answer.address)}.\nThis site      ${printable(answer.siteId)}\nRecovery site  ${printable(answer.agentSiteId)}\n`,
      )
    })
}
