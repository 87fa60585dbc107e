import { Type } from '@sinclair/typebox'
import type { Static } from '@sinclair/typebox'

const siteId = Type.String({ pattern: '^[0-9a-f-]{36}$' })
const pem = Type.String({ minLength: 1, maxLength: 8192 })

/** Protected site -> agent, after the agent's authority was verified. */
export const PairRequest = Type.Object(
  { version: Type.Literal(1), secret: Type.String({ minLength: 1, maxLength: 128 }), siteId, csrPem: pem },
  { additionalProperties: false },
)
export type PairRequest = Static<typeof PairRequest>

/** Agent -> protected site. */
export const PairAnswer = Type.Union([
  Type.Object({ ok: Type.Literal(true), siteId, agentSiteId: siteId, certificatePem: pem, authorityPem: pem }),
  Type.Object({ ok: Type.Literal(false), message: Type.String({ maxLength: 500 }), hint: Type.Optional(Type.String({ maxLength: 500 })) }),
])
export type PairAnswer = Static<typeof PairAnswer>
