import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError, errorCode } from '../../core/errors/index.ts'
import { NO_DISK, SECTOR_BYTES } from '../../core/record/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import { diskOfMirrorFile } from '../mirror/index.ts'

type Found = Pick<DiskEntry, 'key' | 'sizeBytes'>

/**
 * The numbers of the disks of a new attach. A disk of the attach before keeps its number and may grow; one that is new, came back after it was away, or is
 * smaller than before gets a fresh one, in the order in which they are named, and with it a copy of its own. Pure.
 * @param next this number and those above were never given
 */
export const numberDisks = (known: readonly DiskEntry[], next: number, found: readonly Found[]): DiskEntry[] => {
  let fresh = next
  return found.map(({ key, sizeBytes }) => {
    const before = known.find((disk) => disk.key === key)
    return { disk: before !== undefined && before.sizeBytes <= sizeBytes ? before.disk : fresh++, key, sizeBytes }
  })
}

/**
 * Those of a complete base that came, or whose first copy has not ended, are joining; if that would be all, none is: their content is part of the attach's sync. Pure.
 * @param known the disks of the attach before
 */
export const withJoining = (known: readonly DiskEntry[], numbered: readonly DiskEntry[]): DiskEntry[] => {
  const isWhole = ({ disk }: DiskEntry): boolean => known.some((one) => one.disk === disk && one.joining !== true)
  if (!numbered.some(isWhole)) return [...numbered]
  return numbered.map((one) => (isWhole(one) ? one : { ...one, joining: true }))
}

/** The lowest number that was never given: every disk has a mirror from its first attach on, and keeps it after it is gone. */
const nextNumber = async (directory: string, known: readonly DiskEntry[]): Promise<number> => {
  const names = await readdir(join(directory, 'mirror')).catch((error: unknown) => {
    if (errorCode(error) === 'ENOENT') return []
    throw error
  })
  return Math.max(-1, ...names.flatMap((name) => diskOfMirrorFile(name) ?? []), ...known.map(({ disk }) => disk)) + 1
}

/**
 * Gives the disks of a new attach their numbers. `known` are those of the attach before. Whatever number the protected site believes a disk to
 * have does not matter: its nodes come and go, what a number means stands here.
 * @throws CdpError BAD_INPUT
 */
export const admitDisks = async (directory: string, known: readonly DiskEntry[], found: readonly Found[]): Promise<DiskEntry[]> => {
  const keys = new Set<string>()
  for (const { key, sizeBytes } of found) {
    if (!Number.isSafeInteger(sizeBytes) || sizeBytes <= 0 || sizeBytes % SECTOR_BYTES !== 0 || keys.has(key)) {
      throw new CdpError('BAD_INPUT', 'a disk of the VM has an impossible size, or is named twice', { context: { key, sizeBytes } })
    }
    keys.add(key)
  }
  const disks = numberDisks(known, await nextNumber(directory, known), found)
  if (disks.some(({ disk }) => disk >= NO_DISK)) throw new CdpError('BAD_INPUT', 'more disks came and went than there are numbers', { hint: 'Delete the replica of this VM and begin anew.' })
  return disks
}
