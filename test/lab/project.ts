import { existsSync, mkdirSync } from 'node:fs'
import { dirname } from 'node:path'
import { CdpError } from '../../core/errors/index.ts'

/** The checkout: the folder with scripts/setup above this file, whether it runs from the sources or from dist. */
export const projectDir = (): string => {
  for (let dir = import.meta.dirname; dir !== '/'; dir = dirname(dir)) if (existsSync(`${dir}/scripts/setup`)) return dir
  throw new CdpError('NOT_FOUND', `no scripts/setup above ${import.meta.dirname}`)
}

/** .cache/lab, made if it is not there. */
export const labCacheDir = (): string => {
  const dir = `${projectDir()}/.cache/lab`
  mkdirSync(dir, { recursive: true })
  return dir
}
