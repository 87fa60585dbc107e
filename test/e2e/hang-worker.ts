import { CdpError } from '../../core/errors/index.ts'
import { tool } from '../lab/index.ts'
import type { LabDaemon } from '../lab/sites.ts'

/**
 * Makes a worker thread of a daemon spin for ever, from outside: through the inspector that node was started with (--inspect=127.0.0.1:0).
 * Resolves when the thread has been told to.
 * @param title of the worker, as its threads are named: 'capture-101'
 */
export const hangWorker = (daemon: LabDaemon, title: string): Promise<void> => tellWorker(daemon, title, 'for (;;);')

/** Ends a worker thread of a daemon at once, as an error that nobody catches does. */
export const endWorker = (daemon: LabDaemon, title: string): Promise<void> => tellWorker(daemon, title, 'process.exit(1)')

const tellWorker = async (daemon: LabDaemon, title: string, statement: string): Promise<void> => {
  const url = daemon.log().match(/ws:\/\/127\.0\.0\.1:\d+\/[0-9a-f-]+/g)?.at(-1)
  if (url === undefined) throw new CdpError('NOT_FOUND', `${daemon.name} was not started with --inspect`)
  const program = `${import.meta.dirname}/inspector-client.${import.meta.filename.endsWith('.ts') ? 'ts' : 'js'}`
  const [command, ...args] = [...daemon.place, process.execPath, program, url, title, statement]
  await tool(command, args, { env: { NODE_OPTIONS: '' } })
}
