import { Type } from '@sinclair/typebox'
import { Request } from './common.ts'

/** GET /v1/events of both daemons: lines of JSON, each one an `answer`; empty lines keep the connection alive. */
export const eventsEndpoint = {
  method: 'GET',
  path: '/v1/events',
  query: Request({
    /** Go on with new events after the kept ones. */
    follow: Type.Boolean({ default: false }),
    /** How many of the kept events, newest last. */
    limit: Type.Integer({ minimum: 0, maximum: 10_000, default: 1000 }),
  }),
  answer: Type.Object({
    seq: Type.Integer({ minimum: 1 }),
    atUnixMs: Type.Number(),
    level: Type.Union([Type.Literal('info'), Type.Literal('warn'), Type.Literal('error')]),
    kind: Type.String(),
    message: Type.String(),
    context: Type.Record(Type.String(), Type.Union([Type.String(), Type.Number(), Type.Boolean()])),
  }),
} as const
