import { CdpError } from '../errors/index.ts'

const secretKey = /secret|token|passw|passphrase|private_?key|authorization|cookie|credential/i
const pairingToken = /cdp1\.[A-Za-z0-9_-]+/g
const pemKey = /-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(-----END [A-Z ]*PRIVATE KEY-----|$)/g
const maxTextLength = 4096
const maxDepth = 4
const maxEntries = 64

const text = (value: string): string => {
  const bounded = value.length > maxTextLength ? `${value.slice(0, maxTextLength)}... (${value.length} characters)` : value
  return bounded.replaceAll(pairingToken, 'cdp1.[redacted]').replaceAll(pemKey, '[redacted key]')
}

const ofError = (error: Error, depth: number): Record<string, unknown> => ({
  name: error.name,
  message: text(error.message),
  ...('code' in error && typeof error.code === 'string' ? { code: error.code } : {}),
  ...(error instanceof CdpError ? { ...(error.hint === undefined ? {} : { hint: error.hint }), context: anything(error.context, depth + 1) } : {}),
  ...(error instanceof CdpError && error.code !== 'INTERNAL' ? {} : { stack: text(error.stack ?? '') }),
  ...(error.cause === undefined ? {} : { cause: anything(error.cause, depth + 1) }),
})

const anything = (value: unknown, depth: number): unknown => {
  switch (typeof value) {
    case 'string':
      return text(value)
    case 'bigint':
      return value.toString()
    case 'function':
    case 'symbol':
      return `[${typeof value}]`
    case 'object': {
      if (value === null) return null
      if (depth > maxDepth) return '[deep]'
      if (Error.isError(value)) return ofError(value, depth)
      if (ArrayBuffer.isView(value)) return `[${value.byteLength} bytes]`
      if (Array.isArray(value)) {
        const some = value.slice(0, maxEntries).map((item) => anything(item, depth + 1))
        return value.length > maxEntries ? [...some, `... ${value.length - maxEntries} more`] : some
      }
      return entries(value as Record<string, unknown>, depth)
    }
    default:
      return value
  }
}

const entries = (value: Record<string, unknown>, depth: number): Record<string, unknown> => {
  const result: Record<string, unknown> = {}
  for (const key of Object.keys(value).slice(0, maxEntries)) {
    const item = value[key]
    if (item === undefined) continue
    result[key] = secretKey.test(key) && typeof item !== 'boolean' && typeof item !== 'number' ? '[redacted]' : anything(item, depth + 1)
  }
  return result
}

/** What is safe to write down of a line: bounded in length and depth, without secrets (by key; pairing tokens and private keys anywhere in text). */
export const redact = {
  text,
  fields: (fields: Record<string, unknown>): Record<string, unknown> => entries(fields, 0),
}
