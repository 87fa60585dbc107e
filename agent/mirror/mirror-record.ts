import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { readJsonFile, writeJsonFile } from '../../core/files/index.ts'
import { CdpError, errorCode } from '../../core/errors/index.ts'

/** What an operator chooses for a disk. `claim`: what is there already may be taken, with what it holds. */
export type MirrorSpec = { kind: 'file' } | { kind: 'qcow2' | 'device'; path: string; claim?: boolean }

/** `mirror/<disk>.json` (docs/format.md, "Mirror"): what the mirror of a disk is, if it is not `mirror/<disk>.raw`. */
export type MirrorRecord = {
  format: 1
  kind: 'qcow2' | 'device'
  path: string
  /** What is served of it. */
  sizeBytes: number
  /** False from before it is made or claimed until that is done and durable. */
  ready: boolean
  /** It was there before us. */
  claimed: boolean
  /** Of a device: what tells it from another one that comes under the same name. */
  identity?: string | undefined
}

const nameOf = (disk: number): string => `${disk}.json`

/** The record of a disk, or undefined if its mirror is a file, or there is none. @throws CdpError FORMAT */
export const readMirrorRecord = async (directory: string, disk: number): Promise<MirrorRecord | undefined> => {
  const path = join(directory, nameOf(disk))
  const json = await readJsonFile(path)
  if (json === undefined) return undefined
  const { format, kind, path: storage, sizeBytes, ready, claimed, identity } = json as Record<string, unknown>
  const sound = format === 1 && (kind === 'qcow2' || kind === 'device') && typeof storage === 'string' && Number.isSafeInteger(sizeBytes) && typeof ready === 'boolean' && typeof claimed === 'boolean'
  if (!sound || !(identity === undefined || typeof identity === 'string')) throw new CdpError('FORMAT', `${path} does not say what a mirror is`, { hint: 'Restore it from a backup; it names the storage of a mirror.' })
  return json as MirrorRecord
}

export const writeMirrorRecord = (directory: string, disk: number, record: MirrorRecord): Promise<void> => writeJsonFile(join(directory, nameOf(disk)), record)

/** The numbers of all disks that have one. */
export const recordedDisks = async (directory: string): Promise<number[]> => {
  try {
    return (await readdir(directory)).flatMap((name) => /^(\d+)\.json$/.exec(name)?.[1] ?? []).map(Number)
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return []
    throw error
  }
}
