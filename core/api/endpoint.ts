import type { Static, TObject, TSchema } from '@sinclair/typebox'

/** One operation of a daemon: the contract that its server implements and its client calls. */
export type Endpoint = {
  method: 'GET' | 'POST' | 'DELETE'
  /** With `:name` places, e.g. /v1/vpgs/:name. */
  path: string
  /** Values for the `:name` places; strings. */
  params?: TObject
  /** Values after the `?`; numbers and booleans are converted from text. */
  query?: TObject
  body?: TObject
  answer: TSchema
}

type Part<E extends Endpoint, Name extends 'params' | 'query' | 'body'> = E[Name] extends TObject ? { [K in Name]: Static<E[Name]> } : unknown

/** What a handler gets and a client gives. */
export type RequestOf<E extends Endpoint> = Part<E, 'params'> & Part<E, 'query'> & Part<E, 'body'>
export type AnswerOf<E extends Endpoint> = Static<E['answer']>

/** `signal` ends when the client goes away or the daemon stops. */
export type Handler<E extends Endpoint> = (request: RequestOf<E> & { signal: AbortSignal }) => Promise<AnswerOf<E>>

export type Endpoints = Record<string, Endpoint>
export type Handlers<T extends Endpoints> = { [Name in keyof T]: Handler<T[Name]> }
export type Route = { endpoint: Endpoint; handle: (request: { params: unknown; query: unknown; body: unknown; signal: AbortSignal }) => Promise<unknown> }

/** Every endpoint of a contract with its handler; the compiler sees to it that none is missing. */
export const implement = <T extends Endpoints>(endpoints: T, handlers: Handlers<T>): Route[] =>
  Object.entries(endpoints).map(([name, endpoint]) => ({ endpoint, handle: handlers[name as keyof T] as unknown as Route['handle'] }))
