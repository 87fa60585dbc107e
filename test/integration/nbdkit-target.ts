import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { join } from 'node:path'

/** An NBD server of nbdkit on a unix socket: a target that is not ours, to hold ours against. */
export type NbdkitTarget = {
  socketPath: string
  pid: number
  /** SIGKILL: the peer sees the end at once. */
  kill: () => Promise<void>
  /** SIGTERM, then what the stats filter wrote. */
  stop: () => Promise<string>
  [Symbol.asyncDispose]: () => Promise<void>
}

/** `plugin`: nbdkit's own arguments, for instance ['memory', '64M']. */
export const startNbdkit = async (dir: string, name: string, plugin: readonly string[]): Promise<NbdkitTarget> => {
  const socketPath = join(dir, name)
  const statsPath = join(dir, `${name}.stats`)
  const pidPath = join(dir, `${name}.pid`)
  const child = spawn('nbdkit', ['-f', '-U', socketPath, '-P', pidPath, '--filter=stats', ...plugin, `statsfile=${statsPath}`], { stdio: ['ignore', 'ignore', 'pipe'] })
  let stderr = ''
  child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text))
  const exited = once(child, 'exit')
  const end = async (signal: 'SIGKILL' | 'SIGTERM') => {
    child.kill(signal)
    await exited
  }
  const endsAtMs = performance.now() + 10_000
  while (!existsSync(pidPath)) {
    if (child.exitCode !== null || performance.now() > endsAtMs) throw new Error(`nbdkit ${plugin.join(' ')} did not start: ${stderr}`)
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  return {
    socketPath, pid: child.pid ?? -1, kill: () => end('SIGKILL'),
    stop: async () => {
      await end('SIGTERM')
      return readFile(statsPath, 'utf8')
    },
    [Symbol.asyncDispose]: () => end('SIGKILL'),
  }
}
