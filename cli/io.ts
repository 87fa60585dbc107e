import type { Readable } from 'node:stream'

/** The world around one run of pvecdp; passed in, so that a test is a caller like any other. */
export type CliIo = {
  stdin: Readable & { isTTY?: boolean }
  stdout: { write(text: string): unknown }
  stderr: { write(text: string): unknown }
  env: Record<string, string | undefined>
  nowUnixMs: () => number
  /** Colours on stdout. */
  color: boolean
  /** Ends what waits (Ctrl-C). */
  signal: AbortSignal
}
