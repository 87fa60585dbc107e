import { Type } from '@sinclair/typebox'
import type { Static } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'
import { CdpError } from '../errors/index.ts'

const TokenContent = Type.Object(
  {
    /** Where the agent listens, as the protected site reaches it. */
    host: Type.String({ minLength: 1, maxLength: 253, pattern: '^[A-Za-z0-9._:%-]+$' }),
    port: Type.Integer({ minimum: 1, maximum: 65_535 }),
    /** SHA-256 of the authority's certificate (DER), hex: what the protected site verifies before it says anything. */
    caFingerprintSha256: Type.String({ pattern: '^[0-9a-f]{64}$' }),
    /** 32 random bytes, base64url. */
    secret: Type.String({ pattern: '^[A-Za-z0-9_-]{43}$' }),
  },
  { additionalProperties: false },
)
export type PairingToken = Static<typeof TokenContent>

const prefix = 'cdp1.'
const maxLength = 1024
const hint = 'Copy the whole line that "pvecdp pair token" printed at the recovery site, or make a new one there.'

export const formatToken = (token: PairingToken): string => {
  const broken = Value.Errors(TokenContent, token).First()
  if (broken !== undefined) throw new CdpError('BAD_INPUT', `no token can be made: ${broken.path.slice(1)} ${broken.message.toLowerCase()}`)
  return prefix + Buffer.from(JSON.stringify(token)).toString('base64url')
}

/** Reads a token; white space around it is ignored. Throws BAD_INPUT, never repeating what was given. */
export const parseToken = (text: string): PairingToken => {
  const token = text.trim()
  if (token === '') throw new CdpError('BAD_INPUT', 'no pairing token was given', { hint })
  if (!token.startsWith(prefix) || token.length > maxLength || !/^[A-Za-z0-9_-]+$/.test(token.slice(prefix.length))) {
    throw new CdpError('BAD_INPUT', 'this is not a pairing token: one begins with "cdp1." and has no spaces', { hint })
  }
  let content: unknown
  try {
    content = JSON.parse(Buffer.from(token.slice(prefix.length), 'base64url').toString('utf8'))
  } catch {
    throw new CdpError('BAD_INPUT', 'the pairing token is damaged or was cut off', { hint })
  }
  if (!Value.Check(TokenContent, content)) throw new CdpError('BAD_INPUT', 'the pairing token is damaged or of another version', { hint })
  return content
}
