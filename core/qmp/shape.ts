import { CdpError } from '../errors/index.ts'

export type JsonObject = { readonly [name: string]: unknown }

const wrong = (what: string, wanted: string): CdpError => new CdpError('QMP_PROTOCOL', `QEMU sent no ${wanted} where ${what} belongs`, { context: { what, wanted } })

/** @throws CdpError QMP_PROTOCOL unless `value` is a JSON object. */
export const asObject = (value: unknown, what: string): JsonObject => {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw wrong(what, 'object')
  return value as JsonObject
}

/** @throws CdpError QMP_PROTOCOL unless `value` is a JSON array. */
export const asList = (value: unknown, what: string): readonly unknown[] => {
  if (!Array.isArray(value)) throw wrong(what, 'list')
  return value as readonly unknown[]
}

export const stringField = (object: JsonObject, name: string): string => {
  const value = object[name]
  if (typeof value !== 'string') throw wrong(name, 'string')
  return value
}

export const booleanField = (object: JsonObject, name: string): boolean => {
  const value = object[name]
  if (typeof value !== 'boolean') throw wrong(name, 'boolean')
  return value
}

/** A size, an offset or a counter: a whole number from 0 to 2^53 - 1. */
export const countField = (object: JsonObject, name: string): number => {
  const value = object[name]
  if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < 0) throw wrong(name, 'whole number below 2^53')
  return value
}

export const objectField = (object: JsonObject, name: string): JsonObject => asObject(object[name], name)

export const listField = (object: JsonObject, name: string): readonly unknown[] => asList(object[name], name)

/** The field read by `read`, or undefined when QEMU left it out or sent null. */
export const optionalField = <T>(object: JsonObject, name: string, read: (object: JsonObject, name: string) => T): T | undefined =>
  object[name] === undefined || object[name] === null ? undefined : read(object, name)
