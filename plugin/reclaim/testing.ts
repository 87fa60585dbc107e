import { createServer } from 'node:net'
import type { Socket } from 'node:net'

/** What a fake agent answers to a command; undefined: nothing. */
export type FakeAnswer = (command: string, args: Record<string, unknown>) => Promise<object | undefined> | object | undefined

/** A guest agent's socket without a guest. `stale`: what somebody else's questions left. For tests. */
export const serveFakeAgent = async (path: string, answer: FakeAnswer, stale = ''): Promise<AsyncDisposable & { path: string }> => {
  const sockets = new Set<Socket>()
  const server = createServer((socket) => {
    sockets.add(socket)
    socket.on('error', () => undefined)
    let text = ''
    socket.on('data', (chunk: Buffer) => {
      text += chunk.toString('latin1')
      for (let end = text.indexOf('\n'); end >= 0; end = text.indexOf('\n')) {
        const line = text.slice(text.lastIndexOf('\xff', end) + 1, end)
        text = text.slice(end + 1)
        const { execute, arguments: args = {} } = JSON.parse(line) as { execute: string; arguments?: Record<string, unknown> }
        if (execute === 'guest-sync-delimited') socket.write(Buffer.from(`${stale}\xff${JSON.stringify({ return: args['id'] })}\n`, 'latin1'))
        else void Promise.resolve(answer(execute, args)).then((said) => said === undefined ? undefined : socket.write(`${JSON.stringify(said)}\n`))
      }
    })
  })
  await new Promise<void>((resolve) => server.listen(path, resolve))
  return {
    path,
    [Symbol.asyncDispose]: async () => {
      for (const socket of sockets) socket.destroy()
      await new Promise<void>((resolve) => server.close(() => resolve()))
    },
  }
}
