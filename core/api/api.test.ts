import { once } from 'node:events'
import { mkdtemp, rm, stat, writeFile } from 'node:fs/promises'
import { request as httpRequest } from 'node:http'
import { connect, createServer } from 'node:net'
import { join } from 'node:path'
import { Type } from '@sinclair/typebox'
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { CdpError } from '../errors/index.ts'
import { loggerTo, silentLogger } from '../log/index.ts'
import type { LogLine } from '../log/index.ts'
import { ApiClient, createApi, EventLog, implement } from './index.ts'
import type { ApiEvent, Endpoints } from './index.ts'

const contract = {
  greet: {
    method: 'GET',
    path: '/v1/greet/:who',
    params: Type.Object({ who: Type.String({ pattern: '^[a-z]+$' }) }, { additionalProperties: false }),
    query: Type.Object({ times: Type.Integer({ minimum: 1, default: 1 }), loud: Type.Optional(Type.Boolean()) }, { additionalProperties: false }),
    answer: Type.Object({ text: Type.String() }),
  },
  put: {
    method: 'POST',
    path: '/v1/things',
    body: Type.Object({ name: Type.String(), sizeBytes: Type.Integer({ minimum: 0 }) }, { additionalProperties: false }),
    answer: Type.Object({ id: Type.Integer() }),
  },
  fail: { method: 'POST', path: '/v1/fail', body: Type.Object({ how: Type.String() }, { additionalProperties: false }), answer: Type.Object({}) },
  wait: { method: 'GET', path: '/v1/wait', answer: Type.Object({}) },
  wrong: { method: 'GET', path: '/v1/wrong', answer: Type.Object({ count: Type.Integer() }) },
} as const satisfies Endpoints

let root: string
let socketPath: string
let events: EventLog
let stack: AsyncDisposableStack
let aborted: PromiseWithResolvers<void>
let lines: LogLine[]

beforeEach(async () => {
  stack = new AsyncDisposableStack()
  root = await mkdtemp('/tmp/cdp-api-')
  stack.defer(() => rm(root, { recursive: true, force: true }))
  socketPath = join(root, 'd', 'x.sock')
  events = new EventLog({ capacity: 4 })
  aborted = Promise.withResolvers<void>()
  lines = []
})
afterEach(() => stack.disposeAsync())

const routes = () =>
  implement(contract, {
    greet: async ({ params, query }) => ({ text: `${query.loud === true ? 'HELLO' : 'hello'} ${params.who} ${query.times}` }),
    put: async ({ body }) => ({ id: body.sizeBytes }),
    fail: async ({ body }) => {
      if (body.how === 'bug') throw new TypeError('x is undefined')
      throw new CdpError('CONFLICT', 'the VPG exists', { hint: 'Choose another name.', context: { vpg: 'web' } })
    },
    wait: async ({ signal }) => {
      await once(signal, 'abort')
      aborted.resolve()
      return {}
    },
    wrong: async () => ({ count: 1.5 }),
  })
const serve = async () => stack.use(await createApi({ socketPath, routes: routes(), log: loggerTo('debug', (line) => lines.push(line)), events }))
const client = (options: { deadlineMs?: number } = {}): ApiClient => new ApiClient({ socketPath, daemon: 'the thing', unit: 'thing.service', ...options })

const raw = async (
  method: string,
  path: string,
  body?: string,
  headers: Record<string, string> = { 'content-type': 'application/json' },
): Promise<{ status: number; json: unknown }> => {
  const outgoing = httpRequest({ socketPath, method, path, headers, agent: false })
  outgoing.on('error', () => undefined).end(body)
  const [response] = (await once(outgoing, 'response')) as [AsyncIterable<Buffer> & { statusCode: number }]
  let text = ''
  for await (const chunk of response) text += String(chunk)
  return { status: response.statusCode, json: JSON.parse(text) }
}

describe('API', () => {
  test('a call passes path, query and body, converted and completed; the socket is 0660', async () => {
    await serve()
    expect((await stat(socketPath)).mode & 0o777).toBe(0o660)
    expect(await client().call(contract.greet, { params: { who: 'bob' }, query: { times: 3, loud: true } })).toEqual({ text: 'HELLO bob 3' })
    expect((await raw('GET', '/v1/greet/bob')).json).toEqual({ text: 'hello bob 1' })
    expect(await client().call(contract.put, { body: { name: 'a', sizeBytes: 7 } })).toEqual({ id: 7 })
  })

  const bad: [string, string, string | undefined, string][] = [
    ['POST', '/v1/things', '{"name":"a","sizeBytes":1,"colour":"red"}', 'unknown field "colour"'],
    ['POST', '/v1/things', '{"name":"a"}', '"sizeBytes" is missing'],
    ['POST', '/v1/things', '{"name":"a","sizeBytes":"7"}', '"sizeBytes" in the body'],
    ['POST', '/v1/things', '{"name":"a","sizeBytes":-1}', '"sizeBytes" in the body'],
    ['POST', '/v1/things', '[1]', 'not a JSON object'],
    ['POST', '/v1/things', '{', 'JSON'],
    ['POST', '/v1/things', undefined, 'not a JSON object'],
    ['POST', '/v1/things', 'LARGE', 'too large'],
    ['GET', '/v1/greet/BOB', undefined, '"who" in the path'],
    ['GET', '/v1/greet/bob?times=0', undefined, '"times" in the query'],
    ['GET', '/v1/greet/bob?time=2', undefined, 'unknown field "time"'],
    ['GET', '/v1/wrong?x=1', undefined, 'takes no query'],
    ['GET', '/v1/events?follow=perhaps', undefined, '"follow"'],
  ]
  test.each(bad)('%s %s %s is refused with 400 and names what is wrong', async (method, path, body, message) => {
    await serve()
    const { status, json } = await raw(
      method,
      path,
      body?.replace('LARGE', `{"name":"${'x'.repeat(70_000)}","sizeBytes":1}`),
      body === undefined ? {} : { 'content-type': 'application/json' },
    )
    expect(json).toMatchObject({ error: { code: 'BAD_INPUT', message: expect.stringContaining(message) } })
    expect(status).toBe(400)
  })

  test('errors keep code, message, hint and context; a bug is logged and is INTERNAL', async () => {
    await serve()
    await expect(client().call(contract.fail, { body: { how: 'refuse' } })).rejects.toMatchObject({
      code: 'CONFLICT',
      message: 'the VPG exists',
      hint: 'Choose another name.',
      context: { vpg: 'web' },
    })
    expect((await raw('POST', '/v1/fail', '{"how":"refuse"}')).status).toBe(409)
    await expect(client().call(contract.fail, { body: { how: 'bug' } })).rejects.toMatchObject({ code: 'INTERNAL' })
    expect(lines.find((line) => line.level === 'error')).toMatchObject({ message: 'request failed' })
    expect((await raw('GET', '/v9/x')).json).toMatchObject({ error: { code: 'NOT_FOUND' } })
  })

  test('an answer that breaks its schema is logged by the server and refused by the client', async () => {
    await serve()
    await expect(client().call(contract.wrong, {})).rejects.toMatchObject({ code: 'INTERNAL', hint: expect.stringContaining('same version') })
    expect(lines.some((line) => line.message === 'an answer does not match its schema')).toBe(true)
  })

  test('a deadline, a caller that gives up and a closing daemon end the handler too', async () => {
    const server = await serve()
    await expect(client({ deadlineMs: 100 }).call(contract.wait, {})).rejects.toMatchObject({ code: 'TIMEOUT' })
    await aborted.promise
    const abort = new AbortController()
    const given = client().call(contract.wait, {}, { signal: abort.signal })
    abort.abort()
    await expect(given).rejects.toMatchObject({ code: 'ABORTED' })
    const last = Promise.allSettled([client().call(contract.wait, {})])
    await client().call(contract.put, { body: { name: 'a', sizeBytes: 1 } })
    await server[Symbol.asyncDispose]()
    expect(await last).toHaveLength(1)
  })

  test('no daemon: UNREACHABLE with a hint; so is a stale socket, which a new daemon takes over', async () => {
    await expect(client().call(contract.wrong, {})).rejects.toMatchObject({ code: 'UNREACHABLE', hint: 'Start it: systemctl start thing.service' })
    const server = await serve()
    await expect(createApi({ socketPath, routes: [], log: silentLogger, events })).rejects.toMatchObject({ code: 'CONFLICT' })
    await server[Symbol.asyncDispose]()
    await server[Symbol.asyncDispose]()
    const stale = createServer().listen(socketPath)
    await once(stale, 'listening')
    const { spawnSync } = await import('node:child_process')
    // A hard link survives the close that removes the name.
    spawnSync('ln', [socketPath, `${socketPath}.kept`])
    stale.close()
    await once(stale, 'close')
    spawnSync('mv', [`${socketPath}.kept`, socketPath])
    expect((await stat(socketPath)).isSocket()).toBe(true)
    await expect(client().call(contract.wrong, {})).rejects.toMatchObject({ code: 'UNREACHABLE' })
    await serve()
    expect(await client().call(contract.put, { body: { name: 'a', sizeBytes: 1 } })).toEqual({ id: 1 })
  })

  test('an ordinary file in the place of the socket, and a path too long, are refused', async () => {
    socketPath = join(root, 'file')
    await writeFile(socketPath, 'precious')
    await expect(serve()).rejects.toMatchObject({ code: 'CONFLICT' })
    socketPath = join(root, 'x'.repeat(120))
    await expect(serve()).rejects.toMatchObject({ code: 'BAD_INPUT' })
  })
})

describe('events', () => {
  const add = (number: number): ApiEvent => events.append({ level: 'info', kind: 'test.happened', message: `event ${number}`, context: { number } })
  const numbers = (some: ApiEvent[]): unknown[] => some.map((event) => event.context['number'])

  test('the ring keeps the newest, in order, gap-free numbered', () => {
    for (let number = 1; number <= 10; number += 1) {
      add(number)
      expect(numbers(events.recent())).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9, 10].slice(Math.max(0, number - 4), number))
    }
    expect(numbers(events.recent(2))).toEqual([9, 10])
    expect(events.recent(0)).toEqual([])
    expect(events.recent().map((event) => event.seq)).toEqual([7, 8, 9, 10])
  })

  test('a reader gets what is kept and then, when it follows, what comes; it ends with the daemon', async () => {
    const server = await serve()
    add(1)
    const kept: ApiEvent[] = []
    for await (const event of client().events({ follow: false, limit: 10 })) kept.push(event)
    expect(numbers(kept)).toEqual([1])
    const following = client().events({ follow: true, limit: 10 })
    expect((await following.next()).value).toMatchObject({ kind: 'test.happened', context: { number: 1 } })
    const next = following.next()
    add(2)
    expect((await next).value).toMatchObject({ context: { number: 2 } })
    const end = following.next()
    await server[Symbol.asyncDispose]()
    expect(await end).toEqual({ done: true, value: undefined })
  })

  test('a follower that stops leaves nothing behind', async () => {
    await serve()
    const abort = new AbortController()
    const following = client().events({ follow: true, limit: 10 }, { signal: abort.signal })
    const first = following.next()
    add(1)
    await first
    const end = following.next()
    abort.abort()
    expect(await end).toEqual({ done: true, value: undefined })
  })

  test('a reader that does not read is dropped, others go on', async () => {
    const server = await serve()
    const lazy = connect(socketPath)
    lazy.on('error', () => undefined).write('GET /v1/events?follow=true HTTP/1.1\r\nhost: x\r\n\r\n')
    await once(lazy, 'readable')
    const eager = client().events({ follow: true, limit: 10 })
    const first = eager.next()
    add(0)
    await first
    const big = 'x'.repeat(50_000)
    for (let number = 1; server.droppedReaders === 0 && number < 1000; number += 1) {
      events.append({ level: 'info', kind: 'test.big', message: big })
      expect((await eager.next()).value).toMatchObject({ kind: 'test.big' })
    }
    expect(server.droppedReaders).toBe(1)
    expect(lines.some((line) => line.message.startsWith('event reader dropped'))).toBe(true)
    lazy.destroy()
    await eager.return()
  })
})
