import { once } from 'node:events'
import { mkdtemp, rm } from 'node:fs/promises'
import { createServer } from 'node:net'
import type { Server, Socket } from 'node:net'
import { join } from 'node:path'

// For tests: a server on a unix socket that does what the test says, line by line.

export const fakeGreeting = '{"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": []}}\r\n'

export type FakeCommand = { execute: string; arguments: Record<string, unknown>; id: string }
export type FakeQmpServer = { socketPath: string; server: Server; commands: FakeCommand[]; [Symbol.asyncDispose]: () => Promise<void> }

/** `onConnect` runs for each client; qmp_capabilities is answered here, every other command goes to `onCommand`. */
export const startFakeQmp = async (
  onCommand: (socket: Socket, command: FakeCommand) => void,
  onConnect: (socket: Socket) => void = (socket) => socket.write(fakeGreeting),
): Promise<FakeQmpServer> => {
  const dir = await mkdtemp('/tmp/cdp-')
  const socketPath = join(dir, 'qmp')
  const commands: FakeCommand[] = []
  const sockets = new Set<Socket>()
  const server = createServer((socket) => {
    sockets.add(socket)
    socket.on('error', () => socket.destroy())
    let text = ''
    socket.setEncoding('utf8').on('data', (chunk) => {
      text += String(chunk)
      const lines = text.split('\n')
      text = lines.pop() ?? ''
      for (const line of lines) {
        const command = JSON.parse(line) as FakeCommand
        commands.push(command)
        if (command.execute === 'qmp_capabilities') socket.write(`{"return": {}, "id": "${command.id}"}\r\n`)
        else onCommand(socket, command)
      }
    })
    onConnect(socket)
  })
  server.listen(socketPath)
  await once(server, 'listening')
  return {
    socketPath, server, commands,
    [Symbol.asyncDispose]: async () => {
      for (const socket of sockets) socket.destroy()
      server.close()
      await rm(dir, { recursive: true, force: true })
    },
  }
}
