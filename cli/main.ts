#!/usr/bin/env node
// pvecdp: what operators call on either side. Talks to the plugin and the agent over their unix sockets and knows nothing else.
import { runCli } from './run.ts'

const interrupt = new AbortController()
for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, () => interrupt.abort())
// "pvecdp events | head": the reader went away, there is nobody left to tell.
process.stdout.on('error', () => process.exit(0))

process.exitCode = await runCli(process.argv.slice(2), {
  stdin: process.stdin,
  stdout: process.stdout,
  stderr: process.stderr,
  env: process.env,
  nowUnixMs: Date.now,
  color: process.stdout.isTTY === true && process.env['NO_COLOR'] === undefined,
  signal: interrupt.signal,
})
