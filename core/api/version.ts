import { existsSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'

/** The version in the package.json above this file, from the sources and from dist alike. */
export const packageVersion = (): string => {
  for (let directory = import.meta.dirname; directory !== dirname(directory); directory = dirname(directory)) {
    const path = join(directory, 'package.json')
    if (!existsSync(path)) continue
    const content = JSON.parse(readFileSync(path, 'utf8')) as { name?: string; version?: string }
    if (content.name === 'pve-cdp' && content.version !== undefined) return content.version
  }
  return 'unknown'
}
