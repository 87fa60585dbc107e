import type { TSchema } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'
import { CdpError } from '../errors/index.ts'

/**
 * Checks a part of a request; unknown fields are an error, because a misspelt one would silently do nothing.
 * `text`: values came as text (query, path) and are converted first. Throws BAD_INPUT naming the field.
 */
export const checkRequest = (schema: TSchema | undefined, value: unknown, part: 'path' | 'query' | 'body'): unknown => {
  if (schema === undefined) {
    if (value !== undefined && value !== null && (typeof value !== 'object' || Object.keys(value).length > 0))
      throw new CdpError('BAD_INPUT', `this operation takes no ${part}`)
    return undefined
  }
  const given = part === 'body' ? value : Value.Convert(schema, { ...(value as object) })
  const completed = Value.Default(schema, given)
  if (Value.Check(schema, completed)) return completed
  throw new CdpError('BAD_INPUT', explain(schema, completed, part))
}

const explain = (schema: TSchema, value: unknown, part: string): string => {
  const error = Value.Errors(schema, value).First()
  if (error === undefined || error.path === '') return `the ${part} is not a JSON object`
  const field = error.path.slice(1).replaceAll('/', '.')
  if (error.message === 'Unexpected property') return `unknown field "${field}" in the ${part}`
  const wanted = typeof error.schema['description'] === 'string' ? error.schema['description'] : error.message.replace(/^Expected/, 'expected')
  return error.value === undefined ? `"${field}" is missing in the ${part}: ${wanted}` : `"${field}" in the ${part}: ${wanted}`
}

/** Where an answer differs from its schema; undefined if nowhere. More fields than the schema knows are fine. */
export const answerMismatch = (schema: TSchema, value: unknown): string | undefined => {
  if (Value.Check(schema, value)) return undefined
  const error = Value.Errors(schema, value).First()
  return `${error?.path === '' ? 'the whole' : error?.path}: ${error?.message}`
}
