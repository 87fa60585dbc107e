import { spawn } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { CdpError } from '../../core/errors/index.ts'

export type ToolResult = { exitCode: number | null; signal: string | null; stdout: string; stderr: string }
export type ToolOptions = { deadlineMs?: number; input?: string | Buffer; cwd?: string; env?: Record<string, string>; maxOutputBytes?: number; signal?: AbortSignal }

/** The promise, or TIMEOUT naming `what` once `deadlineMs` have passed. The work itself is not ended by it. */
export const withDeadline = async <T>(work: Promise<T>, deadlineMs: number, what: string): Promise<T> => {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<never>((_resolve, reject) => {
    timer = setTimeout(() => reject(new CdpError('TIMEOUT', `${what}: nothing within ${deadlineMs} ms`)), deadlineMs)
  })
  try {
    return await Promise.race([work, late])
  } finally {
    clearTimeout(timer)
  }
}

/** Runs a program to its end and captures its output. At the deadline (60 s by default) it is killed and TIMEOUT is thrown. */
export const runTool = async (command: string, args: readonly string[], options: ToolOptions = {}): Promise<ToolResult> => {
  const { deadlineMs = 60_000, input, cwd, env, maxOutputBytes = 64 << 20, signal } = options
  const child = spawn(command, args, { stdio: ['pipe', 'pipe', 'pipe'], cwd, ...(env ? { env: { ...process.env, ...env } } : {}), signal, killSignal: 'SIGKILL' })
  const chunks = { stdout: [] as Buffer[], stderr: [] as Buffer[] }
  let outputBytes = 0
  for (const stream of ['stdout', 'stderr'] as const) {
    child[stream].on('data', (chunk: Buffer) => {
      outputBytes += chunk.length
      if (outputBytes <= maxOutputBytes) chunks[stream].push(chunk)
      else child.kill('SIGKILL')
    })
  }
  const ended = new Promise<ToolResult>((resolve, reject) => {
    child.on('error', (cause) => reject(new CdpError('IO', `${command} cannot run: ${cause.message}`, { cause })))
    child.on('close', (exitCode, killedBy) =>
      resolve({ exitCode, signal: killedBy, stdout: Buffer.concat(chunks.stdout).toString(), stderr: Buffer.concat(chunks.stderr).toString() }),
    )
  })
  child.stdin.on('error', () => child.stdin.destroy()) // the tool need not read its input
  child.stdin.end(input)
  try {
    return await withDeadline(ended, deadlineMs, `${command} ${args.join(' ')}`)
  } finally {
    child.kill('SIGKILL')
  }
}

/** As runTool; anything but exit code 0 throws IO with the end of the output. */
export const tool = async (command: string, args: readonly string[], options: ToolOptions = {}): Promise<ToolResult> => {
  const result = await runTool(command, args, options)
  if (result.exitCode === 0) return result
  const text = (result.stderr + result.stdout).trim().slice(-2000)
  throw new CdpError('IO', `${command} ${args.join(' ')} ended with ${result.signal ?? result.exitCode}: ${text}`, { context: { exitCode: result.exitCode ?? -1 } })
}

/** The command line of a process, or undefined if there is none (or only its zombie is left). */
export const commandLineOf = (pid: number): string[] | undefined => {
  try {
    const text = readFileSync(`/proc/${pid}/cmdline`, 'utf8')
    return text === '' ? undefined : text.split('\0').slice(0, -1)
  } catch {
    return undefined // it ended
  }
}

export const isAlive = (pid: number): boolean => commandLineOf(pid) !== undefined

/** Processes, this one apart, that have `text` somewhere in their command line. */
export const processesWith = (text: string): { pid: number; commandLine: string }[] =>
  readdirSync('/proc').flatMap((name) => {
    const pid = Number(name)
    if (!Number.isInteger(pid) || pid === process.pid) return []
    const commandLine = commandLineOf(pid)?.join(' ')
    return commandLine?.includes(text) ? [{ pid, commandLine }] : []
  })

/** Waits for the end of a process that need not be our child; false at the deadline. */
export const waitForEnd = async (pid: number, deadlineMs: number): Promise<boolean> => {
  const until = performance.now() + deadlineMs
  while (isAlive(pid)) {
    if (performance.now() > until) return false
    await delay(10) // no event tells the end of a process that is not a child
  }
  return true
}

/** SIGTERM, then SIGKILL after `graceMs`, to one process that the caller started. */
export const endProcess = async (pid: number, graceMs = 5_000): Promise<void> => {
  for (const [signal, waitMs] of [['SIGTERM', graceMs], ['SIGKILL', 5_000]] as const) {
    if (!isAlive(pid)) return
    try {
      process.kill(pid, signal)
    } catch {
      return // it ended in between
    }
    if (await waitForEnd(pid, waitMs)) return
  }
  throw new CdpError('TIMEOUT', `process ${pid} survived SIGKILL`, { context: { pid } })
}
