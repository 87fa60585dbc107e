import { chmod, lstat, mkdir, rm } from 'node:fs/promises'
import { connect } from 'node:net'
import { dirname } from 'node:path'
import type { FastifyInstance, FastifyReply } from 'fastify'
import { CdpError, errorCode, errorMessage, toCdpError } from '../errors/index.ts'
import type { Logger } from '../log/index.ts'
import type { Endpoint, Route } from './endpoint.ts'
import type { EventLog } from './event-log.ts'
import { EventStreams } from './event-stream.ts'
import { eventsEndpoint } from './schemas/events.ts'
import { httpStatusOf } from './status-codes.ts'
import { answerMismatch, checkRequest } from './validate.ts'

export type ApiOptions = {
  /** Unix socket; made with mode 0660, so root and its group may call. */
  socketPath: string
  /** From implement(). */
  routes: Route[]
  log: Logger
  /** Served as GET /v1/events. */
  events: EventLog
}

export type ApiServer = {
  readonly socketPath: string
  /** Event readers dropped because they read too slowly. */
  readonly droppedReaders: number
  [Symbol.asyncDispose](): Promise<void>
}

const maxBodyBytes = 64 * 1024
const maxConnections = 128
const socketMode = 0o660

/** Starts a daemon's API. Throws CONFLICT when another daemon answers on the socket, IO when it cannot be made. */
export const createApi = async (options: ApiOptions): Promise<ApiServer> => {
  const { socketPath, log } = options
  await prepareSocket(socketPath)
  const streams = new EventStreams(options.events, log)
  const closing = new AbortController()
  // Loaded here: clients import this folder too, and pvecdp should start quickly.
  const { fastify } = await import('fastify')
  const app = fastify({ bodyLimit: maxBodyBytes, requestTimeout: 30_000, forceCloseConnections: true, logger: false })
  setUpErrors(app, log)
  for (const { endpoint, handle } of options.routes) {
    app.route({
      method: endpoint.method,
      url: endpoint.path,
      handler: async (request, reply) => {
        const parts = requestParts(endpoint, request)
        const gone = new AbortController()
        // A request's body that was read fully ends the request's stream, not the response's: that one ends with the client.
        reply.raw.once('close', () => gone.abort())
        const answer = (await handle({ ...parts, signal: AbortSignal.any([gone.signal, closing.signal]) })) ?? {}
        const mismatch = answerMismatch(endpoint.answer, answer)
        if (mismatch !== undefined) log.error('an answer does not match its schema', { method: endpoint.method, path: endpoint.path, mismatch })
        return reply.header('content-type', 'application/json; charset=utf-8').send(JSON.stringify(answer))
      },
    })
  }
  app.get(eventsEndpoint.path, (request, reply) => {
    const query = checkRequest(eventsEndpoint.query, request.query, 'query') as { follow: boolean; limit: number }
    if (streams.full) throw new CdpError('CONFLICT', 'too many readers follow the events already')
    reply.hijack()
    streams.serve(reply.raw, query)
  })

  app.server.maxConnections = maxConnections
  await app.ready()
  await listen(app, socketPath)
  await chmod(socketPath, socketMode)

  let closed: Promise<void> | undefined
  return {
    socketPath,
    get droppedReaders() {
      return streams.dropped
    },
    [Symbol.asyncDispose]: () =>
      (closed ??= (async () => {
        closing.abort()
        streams.close()
        await app.close()
      })()),
  }
}

const requestParts = (endpoint: Endpoint, request: { params: unknown; query: unknown; body: unknown }): { params: unknown; query: unknown; body: unknown } => ({
  params: checkRequest(endpoint.params, request.params, 'path'),
  query: checkRequest(endpoint.query, request.query, 'query'),
  body: checkRequest(endpoint.body, request.body, 'body'),
})

const setUpErrors = (app: FastifyInstance, log: Logger): void => {
  const send = (reply: FastifyReply, error: CdpError): FastifyReply =>
    reply.code(httpStatusOf(error.code)).header('content-type', 'application/json; charset=utf-8').send(JSON.stringify({ error }))
  app.setErrorHandler((error, request, reply) => {
    const status = typeof error === 'object' && error !== null && 'statusCode' in error ? Number(error.statusCode) : 0
    // What fastify itself refuses: no JSON, too large, a foreign content type.
    const failure = error instanceof CdpError || status < 400 || status > 499 ? toCdpError(error) : new CdpError('BAD_INPUT', errorMessage(error))
    if (failure.code === 'INTERNAL') log.error('request failed', { method: request.method, path: request.routeOptions.url, error })
    else if (log.enabled('debug'))
      log.debug('request refused', { method: request.method, path: request.routeOptions.url, code: failure.code, message: failure.message })
    return send(reply, failure)
  })
  app.setNotFoundHandler((request, reply) =>
    send(
      reply,
      new CdpError('NOT_FOUND', `there is no ${request.method} ${request.url.split('?')[0]}`, { hint: 'Do client and daemon have the same version?' }),
    ),
  )
}

const listen = async (app: FastifyInstance, socketPath: string): Promise<void> => {
  const { promise, resolve, reject } = Promise.withResolvers<void>()
  app.server.once('error', reject).once('listening', resolve)
  // Nobody but the owner may connect before the mode is set; bind happens inside this call.
  const umask = process.umask(0o177)
  try {
    app.server.listen(socketPath)
  } finally {
    process.umask(umask)
  }
  try {
    await promise
  } catch (error) {
    await app.close()
    throw new CdpError('IO', `cannot listen on ${socketPath}: ${errorMessage(error)}`, { cause: error, context: { socketPath } })
  } finally {
    app.server.off('error', reject)
  }
}

const prepareSocket = async (socketPath: string): Promise<void> => {
  const context = { socketPath }
  if (Buffer.byteLength(socketPath) > 107) throw new CdpError('BAD_INPUT', `the socket path ${socketPath} is longer than 107 bytes`, { context })
  await mkdir(dirname(socketPath), { recursive: true, mode: 0o755 })
  const there = await lstat(socketPath).catch((error: unknown) => {
    if (errorCode(error) === 'ENOENT') return undefined
    throw error
  })
  if (there === undefined) return
  if (!there.isSocket())
    throw new CdpError('CONFLICT', `${socketPath} exists and is no socket`, { hint: 'Move it away, or configure another socket.', context })
  if (await answers(socketPath))
    throw new CdpError('CONFLICT', `another daemon answers on ${socketPath}`, { hint: 'Stop it first, or configure another socket.', context })
  await rm(socketPath, { force: true })
}

const answers = (socketPath: string): Promise<boolean> => {
  const { promise, resolve } = Promise.withResolvers<boolean>()
  const socket = connect(socketPath)
  socket.once('connect', () => resolve(true)).once('error', (error) => resolve(errorCode(error) !== 'ECONNREFUSED' && errorCode(error) !== 'ENOENT'))
  return promise.finally(() => socket.destroy())
}
