import type { Socket } from 'node:net'
import { describe, expect, test } from '@jest/globals'
import { fakeGreeting, startFakeQmp } from './fake-qmp-server.ts'
import { QmpClient } from './qmp-client.ts'
import { withQmp } from './with-qmp.ts'

const event = (name: string, device: string): string => `{"event": "${name}", "data": {"device": "${device}"}, "timestamp": {"seconds": 1, "microseconds": 2}}\r\n`
const answer = (socket: Socket, id: string, value: unknown = {}): boolean => socket.write(`${JSON.stringify({ return: value, id })}\r\n`)

describe('QmpClient', () => {
  test('a greeting that comes byte by byte is read, and its version kept', async () => {
    await using fake = await startFakeQmp(() => undefined, (socket) => {
      for (const byte of Buffer.from(fakeGreeting)) socket.write(Buffer.of(byte))
    })
    await using qmp = await QmpClient.connect(fake.socketPath)
    expect(qmp.version).toEqual({ major: 10, minor: 0, micro: 2, package: '' })
    expect(fake.commands.map((command) => command.execute)).toEqual(['qmp_capabilities'])
  })

  test('two commands in flight get their own answers, in whatever order those come', async () => {
    const waiting: { id: string; name: string }[] = []
    await using fake = await startFakeQmp((socket, command) => {
      waiting.push({ id: command.id, name: command.execute })
      if (waiting.length === 2) for (const { id, name } of waiting.reverse()) answer(socket, id, name)
    })
    await using qmp = await QmpClient.connect(fake.socketPath)
    expect(await Promise.all([qmp.execute('first'), qmp.execute('second', { x: 1 })])).toEqual(['first', 'second'])
    expect(fake.commands[2]?.arguments).toEqual({ x: 1 })
  })

  test('events between replies are kept for whoever asks after the reply', async () => {
    await using fake = await startFakeQmp((socket, command) => {
      socket.write(event('BLOCK_JOB_READY', 'a'))
      answer(socket, command.id)
      socket.write(event('BLOCK_JOB_READY', 'b'))
    })
    await using qmp = await QmpClient.connect(fake.socketPath)
    const mark = qmp.eventMark
    await qmp.execute('one')
    expect((await qmp.waitForEvent((candidate) => candidate.data['device'] === 'a', { deadlineMs: 1000 })).event).toBe('BLOCK_JOB_READY')
    expect((await qmp.waitForEvent((candidate) => candidate.data['device'] === 'b', { deadlineMs: 1000 })).data).toEqual({ device: 'b' })
    const afterFirst = qmp.eventMark
    expect(afterFirst - mark).toBe(2)
    await expect(qmp.waitForEvent(() => true, { deadlineMs: 10, sinceMark: afterFirst })).rejects.toMatchObject({ code: 'TIMEOUT' })
    await qmp.execute('two')
    expect((await qmp.waitForEvent((candidate) => candidate.data['device'] === 'a', { deadlineMs: 1000, sinceMark: mark })).data).toEqual({ device: 'a' })
  })

  test('the event history is bounded and a mark before its beginning still works', async () => {
    await using fake = await startFakeQmp((socket, command) => {
      socket.write(event('NOISE', 'x').repeat(3000))
      answer(socket, command.id)
    })
    await using qmp = await QmpClient.connect(fake.socketPath)
    await qmp.execute('make-noise')
    expect(qmp.eventMark).toBe(3000)
    let seen = 0
    await expect(qmp.waitForEvent(() => (seen++, false), { deadlineMs: 10, sinceMark: 0 })).rejects.toMatchObject({ code: 'TIMEOUT' })
    expect(seen).toBe(1024)
  })

  test('an error of QEMU becomes QMP_COMMAND with class and description', async () => {
    await using fake = await startFakeQmp((socket, command) => socket.write(`{"id": "${command.id}", "error": {"class": "DeviceNotFound", "desc": "no such thing"}}\r\n`))
    await using qmp = await QmpClient.connect(fake.socketPath)
    await expect(qmp.execute('blockdev-del')).rejects.toMatchObject({
      code: 'QMP_COMMAND', message: 'QEMU refused blockdev-del: no such thing', context: { command: 'blockdev-del', class: 'DeviceNotFound', desc: 'no such thing' } })
  })

  test('answers to commands of an earlier client, which QEMU sends to the next one, are dropped', async () => {
    await using fake = await startFakeQmp((socket, command) => {
      socket.write('{"return": "stale", "id": "cdp-0000-1"}\r\n{"return": "stale", "id": "4711:1"}\r\n{"return": "stale"}\r\n{"error": {"class": "GenericError", "desc": "stale"}}\r\n')
      answer(socket, command.id, 'mine')
    })
    await using one = await QmpClient.connect(fake.socketPath)
    await using other = await QmpClient.connect(fake.socketPath)
    expect(await Promise.all([one.execute('a'), other.execute('a')])).toEqual(['mine', 'mine'])
    expect(new Set(fake.commands.map((command) => command.id)).size).toBe(4)
  })

  test('a disconnect rejects commands and waits under way with CLOSED, and everything after it', async () => {
    await using fake = await startFakeQmp((socket, command) => {
      if (command.execute === 'second') socket.destroy()
    })
    await using qmp = await QmpClient.connect(fake.socketPath)
    const pending = [qmp.execute('first'), qmp.waitForEvent(() => true, { deadlineMs: 1000 }), qmp.execute('second')]
    for (const promise of pending) await expect(promise).rejects.toMatchObject({ code: 'CLOSED' })
    await expect(qmp.execute('third')).rejects.toMatchObject({ code: 'CLOSED' })
    await expect(qmp.waitForEvent(() => true, { deadlineMs: 1000 })).rejects.toMatchObject({ code: 'CLOSED' })
  })

  test('closing waits for answers under way, so that they do not reach the next client, but not for long', async () => {
    const ended = Promise.withResolvers<void>()
    const commands: { socket: Socket; id: string }[] = []
    const bothArrived = Promise.withResolvers<void>()
    await using fake = await startFakeQmp((socket, command) => {
      if (commands.push({ socket, id: command.id }) === 2) bothArrived.resolve()
    }, (socket) => {
      socket.on('close', () => ended.resolve())
      socket.write(fakeGreeting)
    })
    const patient = await QmpClient.connect(fake.socketPath, { lingerMs: 60_000 })
    const pending = patient.execute('slow')
    const sent = patient.execute('slow', {}, { deadlineMs: 1 })
    await expect(sent).rejects.toMatchObject({ code: 'TIMEOUT' })
    const closing = [patient.close(), patient.close()]
    await expect(pending).rejects.toMatchObject({ code: 'CLOSED' })
    await bothArrived.promise
    for (const { socket, id } of commands) answer(socket, id)
    await Promise.all([...closing, ended.promise])

    const hurried = await QmpClient.connect(fake.socketPath, { lingerMs: 10 })
    const lost = hurried.execute('slow')
    const closed = hurried.close()
    await expect(lost).rejects.toMatchObject({ code: 'CLOSED' })
    await closed
  })

  test('a command without an answer ends at its deadline; a late answer disturbs nothing', async () => {
    let late = ''
    await using fake = await startFakeQmp((socket, command) => {
      if (command.execute === 'slow') late = command.id
      else {
        answer(socket, late, 'late')
        answer(socket, command.id, 'quick')
      }
    })
    await using qmp = await QmpClient.connect(fake.socketPath)
    await expect(qmp.execute('slow', {}, { deadlineMs: 20 })).rejects.toMatchObject({ code: 'TIMEOUT', context: { command: 'slow' } })
    expect(await qmp.execute('quick')).toBe('quick')
  })

  test('garbage ends the connection with QMP_PROTOCOL', async () => {
    await using fake = await startFakeQmp((socket) => socket.write('this is not QMP\n'))
    await using qmp = await QmpClient.connect(fake.socketPath)
    await expect(qmp.execute('anything')).rejects.toMatchObject({ code: 'QMP_PROTOCOL' })
    await using wrong = await startFakeQmp(() => undefined, (socket) => socket.write('NBDMAGIC\n'))
    await expect(QmpClient.connect(wrong.socketPath)).rejects.toMatchObject({ code: 'QMP_PROTOCOL' })
  })

  test('no greeting ends at the deadline; nobody listening is NOT_FOUND at once', async () => {
    await using fake = await startFakeQmp(() => undefined, () => undefined)
    await expect(QmpClient.connect(fake.socketPath, { deadlineMs: 30 })).rejects.toMatchObject({ code: 'TIMEOUT', retry: true })
    await expect(QmpClient.connect(`${fake.socketPath}-not`, { deadlineMs: 5000 })).rejects.toMatchObject({ code: 'NOT_FOUND' })
  })

  test('an abort ends connecting, commands and waits', async () => {
    await using silent = await startFakeQmp(() => undefined, () => undefined)
    const controller = new AbortController()
    const connecting = QmpClient.connect(silent.socketPath, { signal: controller.signal })
    controller.abort()
    await expect(connecting).rejects.toMatchObject({ code: 'ABORTED' })
    await expect(QmpClient.connect(silent.socketPath, { signal: controller.signal })).rejects.toMatchObject({ code: 'ABORTED' })
    await using mute = await startFakeQmp(() => undefined)
    await using qmp = await QmpClient.connect(mute.socketPath)
    const later = new AbortController()
    const pending = [qmp.execute('x', {}, { signal: later.signal }), qmp.waitForEvent(() => true, { deadlineMs: 1000, signal: later.signal })]
    later.abort()
    for (const promise of pending) await expect(promise).rejects.toMatchObject({ code: 'ABORTED' })
  })

  test('close is idempotent and disposal after it does nothing more', async () => {
    await using fake = await startFakeQmp(() => undefined)
    const qmp = await QmpClient.connect(fake.socketPath)
    await Promise.all([qmp.close(), qmp.close()])
    await qmp[Symbol.asyncDispose]()
    await expect(qmp.execute('x')).rejects.toMatchObject({ code: 'CLOSED' })
  })
})

describe('withQmp', () => {
  test('the connection is closed when the work throws', async () => {
    const ended = Promise.withResolvers<void>()
    await using fake = await startFakeQmp(() => undefined, (socket) => {
      socket.on('close', () => ended.resolve())
      socket.write(fakeGreeting)
    })
    await expect(withQmp(fake.socketPath, {}, () => Promise.reject(new Error('work failed')))).rejects.toThrow('work failed')
    await ended.promise
  })

  test('while another client is served it waits in line and then gets its turn', async () => {
    const line: Socket[] = []
    await using fake = await startFakeQmp((socket, command) => answer(socket, command.id, command.execute), (socket) => {
      line.push(socket)
      if (line.length === 1) socket.write(fakeGreeting)
      socket.on('close', () => line[1]?.write(fakeGreeting))
    })
    const release = Promise.withResolvers<void>()
    const holdsIt = Promise.withResolvers<void>()
    const first = withQmp(fake.socketPath, {}, async () => {
      holdsIt.resolve()
      await release.promise
    })
    await holdsIt.promise
    const second = withQmp(fake.socketPath, { deadlineMs: 5000 }, (qmp) => qmp.execute('my-turn'))
    release.resolve()
    await first
    expect(await second).toBe('my-turn')
  })
})
