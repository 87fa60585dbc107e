import { Type } from '@sinclair/typebox'
import type { TProperties } from '@sinclair/typebox'

// Requests refuse fields they do not know; answers may have more than a client knows, so that daemons can be newer than clients.
export const Request = <T extends TProperties>(properties: T) => Type.Object(properties, { additionalProperties: false })

export const NoContent = Type.Object({})

export const VpgName = Type.String({
  pattern: '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$',
  description: 'expected a name of up to 63 letters, digits, dots, dashes and underscores',
})
export const VmId = Type.Integer({ minimum: 100, maximum: 999_999_999, description: 'expected a VM id: a number from 100 to 999999999' })
export const CheckpointId = Type.String({ pattern: '^[A-Za-z0-9._-]{1,64}$', description: 'expected a checkpoint id' })
export const UnixMs = Type.Integer({ minimum: 0, maximum: 8_640_000_000_000_000, description: 'expected a time in milliseconds since 1970' })
export const Bytes = Type.Integer({ minimum: 0 })
export const Count = Type.Integer({ minimum: 0 })
export const Seq = Type.Integer({ minimum: 0 })
/** Age of the newest valid checkpoint; null when unknown, and then never shown as good. */
export const RpoMs = Type.Union([Type.Number({ minimum: 0 }), Type.Null()])
export const CheckpointState = Type.Union([Type.Literal('valid'), Type.Literal('proved'), Type.Literal('suspect'), Type.Literal('damaged'), Type.Literal('pending')])
