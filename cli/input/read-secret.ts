import { readFile, stat } from 'node:fs/promises'
import { createInterface } from 'node:readline'
import { Writable } from 'node:stream'
import { errorMessage } from '../../core/errors/index.ts'
import type { CliIo } from '../io.ts'
import { UsageError } from './usage-error.ts'

const maxBytes = 4096

/** A secret from a file. */
export const readSecretFile = async (path: string): Promise<string> => {
  try {
    if ((await stat(path)).size > maxBytes)
      throw new UsageError(`${path} is longer than a token`, 'Give the file that holds the one line that "pvecdp pair token" printed.')
    return await readFile(path, 'utf8')
  } catch (error) {
    throw error instanceof UsageError
      ? error
      : new UsageError(`cannot read ${path}: ${errorMessage(error)}`, 'Give the file that holds the one line that "pvecdp pair token" printed.')
  }
}

/** A secret from standard input: its first line, or, at a terminal, asked for and not echoed. */
export const readSecret = async (io: CliIo, prompt: string): Promise<string> => {
  if (io.stdin.isTTY === true) return askQuietly(io, prompt)
  let text = ''
  for await (const chunk of io.stdin as AsyncIterable<Buffer | string>) {
    text += String(chunk)
    if (text.length > maxBytes) throw new UsageError('standard input holds more than a token', 'Give the one line that "pvecdp pair token" printed.')
    if (text.trimStart().includes('\n')) break
  }
  return text.trimStart().split('\n')[0] ?? ''
}

const askQuietly = async (io: CliIo, prompt: string): Promise<string> => {
  const mute = new Writable({ write: (_chunk, _encoding, done) => done() })
  // The terminal stops echoing here, so the prompt comes after it.
  const terminal = createInterface({ input: io.stdin, output: mute, terminal: true })
  const given = Promise.withResolvers<string>()
  terminal.once('line', given.resolve)
  terminal.once('close', () => given.resolve(''))
  terminal.once('SIGINT', () => terminal.close())
  io.signal.addEventListener('abort', () => terminal.close(), { once: true })
  try {
    io.stderr.write(prompt)
    return await given.promise
  } finally {
    terminal.close()
    io.stderr.write('\n')
  }
}
