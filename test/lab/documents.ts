import { CdpError } from '../../core/errors/index.ts'
import type { Guest } from './guest.ts'

/** MD5 sums by path below the directory. */
export type Manifest = Map<string, string>

/** Writes `count` text files with content that depends on the seed; durable when it returns. */
export const writeDocuments = async (guest: Guest, dir: string, count: number, seed: number): Promise<Manifest> => {
  const manifest = parseManifest(await guest.check(`documents ${dir} ${count} ${seed}`, { deadlineMs: 120_000 }))
  if (manifest.size !== count) throw new CdpError('IO', `${manifest.size} documents were written instead of ${count}`)
  return manifest
}

/** The files below a directory as they are now. */
export const manifestOf = async (guest: Guest, dir: string): Promise<Manifest> => parseManifest(await guest.check(`cd ${dir} && find . -type f | sort | xargs md5sum`, { deadlineMs: 120_000 }))

/** Overwrites and renames every document; the number of files lost. */
export const runRansomware = async (guest: Guest, dir: string): Promise<number> => Number((await guest.check(`ransomware ${dir}`, { deadlineMs: 120_000 })).trim())

/** Paths that differ between two manifests or stand in one only. */
export const manifestDifferences = (before: Manifest, after: Manifest): string[] =>
  [...new Set([...before.keys(), ...after.keys()])].filter((path) => before.get(path) !== after.get(path)).sort()

const parseManifest = (text: string): Manifest =>
  new Map(
    text
      .split('\n')
      .filter(Boolean)
      .map((line): [string, string] => [line.slice(34), line.slice(0, 32)]),
  )
