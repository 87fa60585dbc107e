import { request as httpRequest } from 'node:http'
import type { IncomingMessage } from 'node:http'
import { Type } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'
import { CdpError, errorCode, errorCodes, errorMessage } from '../errors/index.ts'
import type { ErrorCode } from '../errors/index.ts'
import type { AnswerOf, Endpoint, RequestOf } from './endpoint.ts'
import type { ApiEvent } from './event-log.ts'
import { eventsEndpoint } from './schemas/events.ts'
import { answerMismatch } from './validate.ts'

export type ApiClientOptions = {
  socketPath: string
  /** What the daemon is called in messages: "the plugin", "the agent". */
  daemon: string
  /** systemd unit named in the hint when nobody listens. */
  unit: string
  /** For one call; 30 s if not given. */
  deadlineMs?: number
}

type Parts = { params?: Record<string, string>; query?: Record<string, string | number | boolean | undefined>; body?: unknown }
type CallOptions = { deadlineMs?: number; signal?: AbortSignal }

const maxAnswerBytes = 64 * 1024 * 1024
const maxLineBytes = 1024 * 1024

/** Calls a daemon on its unix socket. Errors are CdpErrors: the daemon's own, or UNREACHABLE, TIMEOUT, ABORTED. */
export class ApiClient {
  readonly #options: ApiClientOptions

  constructor(options: ApiClientOptions) {
    this.#options = options
  }

  async call<E extends Endpoint>(endpoint: E, request: RequestOf<E>, options: CallOptions = {}): Promise<AnswerOf<E>> {
    const waits = this.#waits(options)
    try {
      const response = await this.#send(endpoint, request as Parts, waits.signal)
      const text = await readText(response)
      const answer = parse(text)
      if ((response.statusCode ?? 500) >= 400) throw this.#refusal(response.statusCode ?? 500, answer)
      const mismatch = answerMismatch(endpoint.answer, answer)
      if (mismatch !== undefined)
        throw new CdpError('INTERNAL', `${this.#options.daemon} gave an answer that is not understood (${mismatch})`, {
          hint: 'Do pvecdp and the daemon have the same version? Restart the daemon after an upgrade.',
        })
      return answer
    } catch (error) {
      throw waits.explain(error)
    }
  }

  /** The newest `limit` events, then, with `follow`, further ones until the signal ends or the daemon stops. No deadline while following. */
  async *events(query: { follow: boolean; limit: number }, options: { signal?: AbortSignal } = {}): AsyncGenerator<ApiEvent, void> {
    const waits = query.follow ? this.#waits({ deadlineMs: 0, ...options }) : this.#waits(options)
    try {
      const response = await this.#send(eventsEndpoint, { query }, waits.signal)
      if (response.statusCode !== 200) throw this.#refusal(response.statusCode ?? 500, parse(await readText(response)))
      yield* readEvents(response)
    } catch (error) {
      if (query.follow && options.signal?.aborted === true) return
      throw waits.explain(error)
    }
  }

  #send(endpoint: Endpoint, request: Parts, signal: AbortSignal): Promise<IncomingMessage> {
    const { params, query, body } = request
    const path = endpoint.path.replaceAll(/:([a-z]+)/gi, (_, name: string) => encodeURIComponent(params?.[name] ?? ''))
    const search = new URLSearchParams(
      Object.entries(query ?? {}).flatMap(([key, value]) => (value === undefined ? [] : [[key, String(value)] as [string, string]])),
    ).toString()
    const payload = body === undefined ? undefined : JSON.stringify(body)
    const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>()
    const outgoing = httpRequest({
      socketPath: this.#options.socketPath,
      method: endpoint.method,
      path: search === '' ? path : `${path}?${search}`,
      headers: payload === undefined ? {} : { 'content-type': 'application/json', 'content-length': Buffer.byteLength(payload) },
      agent: false,
      signal,
    })
    outgoing.once('response', resolve).on('error', reject).end(payload)
    return promise
  }

  #waits(options: CallOptions): { signal: AbortSignal; explain: (error: unknown) => CdpError } {
    const { daemon, socketPath, unit } = this.#options
    const deadlineMs = options.deadlineMs ?? this.#options.deadlineMs ?? 30_000
    const deadline = deadlineMs === 0 ? undefined : AbortSignal.timeout(deadlineMs)
    const signal = AbortSignal.any([deadline, options.signal].filter((each) => each !== undefined))
    const explain = (error: unknown): CdpError => {
      if (error instanceof CdpError) return error
      if (deadline?.aborted === true)
        return new CdpError('TIMEOUT', `${daemon} did not answer within ${deadlineMs / 1000} s`, {
          cause: error,
          retry: true,
          hint: `See: journalctl -u ${unit}`,
          context: { socketPath },
        })
      if (signal.aborted) return new CdpError('ABORTED', 'the call was given up', { cause: error })
      const code = errorCode(error)
      if (code === 'EACCES')
        return new CdpError('UNREACHABLE', `no permission to talk to ${daemon} on ${socketPath}`, {
          cause: error,
          hint: 'Call pvecdp as root.',
          context: { socketPath },
        })
      if (code === 'ENOENT' || code === 'ECONNREFUSED')
        return new CdpError('UNREACHABLE', `${daemon} is not running: nobody listens on ${socketPath}`, {
          cause: error,
          hint: `Start it: systemctl start ${unit}`,
          context: { socketPath },
        })
      return new CdpError('UNREACHABLE', `${daemon} broke off the conversation: ${errorMessage(error)}`, {
        cause: error,
        retry: true,
        hint: `See: journalctl -u ${unit}`,
        context: { socketPath },
      })
    }
    return { signal, explain }
  }

  #refusal(status: number, answer: unknown): CdpError {
    if (!Value.Check(ErrorAnswer, answer))
      return new CdpError('INTERNAL', `${this.#options.daemon} answered with HTTP status ${status} and no explanation`, {
        hint: `See: journalctl -u ${this.#options.unit}`,
      })
    const { code, message, hint, context } = answer.error
    return new CdpError(code in errorCodes ? (code as ErrorCode) : 'INTERNAL', message, { ...(hint === undefined ? {} : { hint }), context: context ?? {} })
  }
}

const ErrorAnswer = Type.Object({
  error: Type.Object({
    code: Type.String(),
    message: Type.String(),
    hint: Type.Optional(Type.String()),
    context: Type.Optional(Type.Record(Type.String(), Type.Union([Type.String(), Type.Number(), Type.Boolean()]))),
  }),
})

const readText = async (response: IncomingMessage): Promise<string> => {
  const chunks: Buffer[] = []
  let bytes = 0
  for await (const chunk of response as AsyncIterable<Buffer>) {
    bytes += chunk.length
    if (bytes > maxAnswerBytes) throw new CdpError('INTERNAL', `an answer of more than ${maxAnswerBytes} bytes`)
    chunks.push(chunk)
  }
  return Buffer.concat(chunks).toString('utf8')
}

const parse = (text: string): unknown => {
  try {
    return JSON.parse(text)
  } catch {
    return undefined
  }
}

async function* readEvents(response: IncomingMessage): AsyncGenerator<ApiEvent, void> {
  let rest = ''
  response.setEncoding('utf8')
  for await (const chunk of response as AsyncIterable<string>) {
    const lines = (rest + chunk).split('\n')
    rest = lines.pop() ?? ''
    if (rest.length > maxLineBytes) throw new CdpError('INTERNAL', 'an event of more than 1 MiB')
    for (const line of lines) {
      if (line === '') continue
      const event = parse(line)
      if (!Value.Check(eventsEndpoint.answer, event))
        throw new CdpError('INTERNAL', 'an event that is not understood', { hint: 'Do pvecdp and the daemon have the same version?' })
      yield event
    }
  }
}
