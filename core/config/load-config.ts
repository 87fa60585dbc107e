import type { Static, TSchema } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'
import { CdpError } from '../errors/index.ts'
import { readJsonFile } from '../files/index.ts'

/**
 * Reads a configuration file; a missing file is an empty one. Defaults come from the schema.
 * @throws CdpError BAD_INPUT naming the first field that is wrong, FORMAT if the file is not JSON
 */
export const loadConfig = async <T extends TSchema>(path: string | undefined, schema: T): Promise<Static<T>> => {
  const given = path === undefined ? {} : await readJsonFile(path)
  if (path !== undefined && given === undefined) throw new CdpError('NOT_FOUND', `there is no configuration file ${path}`, { hint: 'Create it, or start without --config.' })
  const config: unknown = Value.Default(schema, given)
  if (!Value.Check(schema, config)) {
    const first = Value.Errors(schema, config).First()
    throw new CdpError('BAD_INPUT', `${path ?? 'the configuration'} is not right: ${first?.path ?? ''} ${first?.message ?? ''}`, { hint: 'Correct that field; the others were not looked at.' })
  }
  return config
}
