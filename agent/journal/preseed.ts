import { lstat, mkdir, open, rename } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError, errorCode } from '../../core/errors/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import { mirrorFileName } from '../mirror/index.ts'
import type { MirrorStorage } from '../mirror/index.ts'
import { syncDirectory } from './vm-state.ts'

export type PreseedReport = { /** Keys of disks whose preseed became their mirror. */ taken: string[]; /** Of those that have a mirror already. */ late: string[] }

const statOf = async (path: string): Promise<Awaited<ReturnType<typeof lstat>> | undefined> => {
  try {
    return await lstat(path)
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return undefined
    throw error
  }
}

type Found = { path: string; mirror: string; key: string; isLate: boolean }

/** @throws CdpError CONFLICT for a preseed that is no regular file or larger than its disk */
const findPreseeds = async (directory: string, mirrors: MirrorStorage, disks: readonly DiskEntry[]): Promise<Found[]> => {
  const found: Found[] = []
  for (const { disk, key, sizeBytes } of disks) {
    const path = join(directory, 'preseed', `${key}.raw`)
    const stat = await statOf(path)
    if (stat === undefined) continue
    const mirror = join(directory, 'mirror', mirrorFileName(disk))
    const isLate = await mirrors.exists(disk)
    if (!isLate && (!stat.isFile() || Number(stat.size) > sizeBytes)) {
      throw new CdpError('CONFLICT', `the preseed of ${key} ${stat.isFile() ? 'is larger than its disk' : 'is no regular file'}`, {
        hint: 'Put a raw image of the disk there, or take the file away.', context: { path, sizeBytes },
      })
    }
    if (!isLate && (await mirrors.kindOf({ disk, key })) !== 'file') {
      throw new CdpError('CONFLICT', `the preseed of ${key} is a file, its mirror is none`, {
        hint: 'Convert it into the mirror with qemu-img convert -n, say "claim": true for that in agent.json, and take the file away.', context: { path },
      })
    }
    found.push({ path, mirror, key, isLate })
  }
  return found
}

/** What `takePreseeds` would refuse, refused before anything is changed. @throws CdpError CONFLICT */
export const checkPreseeds = async (directory: string, mirrors: MirrorStorage, disks: readonly DiskEntry[]): Promise<void> => {
  await findPreseeds(directory, mirrors, disks)
}

/**
 * Takes in `preseed/<key>.raw` as the mirror of each disk that has none yet: durable, then renamed. A crash in between leaves either name, and
 * the next attach goes on. Call it once vm.json knows the disks, so that a mirror never stands there without its disk.
 */
export const takePreseeds = async (directory: string, storage: MirrorStorage, disks: readonly DiskEntry[]): Promise<PreseedReport> => {
  const report: PreseedReport = { taken: [], late: [] }
  const mirrors = join(directory, 'mirror')
  for (const { path, mirror, key, isLate } of await findPreseeds(directory, storage, disks)) {
    if (isLate) {
      report.late.push(key)
      continue
    }
    await mkdir(mirrors, { recursive: true })
    // What is compared by hash and found equal is never sent: it has to be on the disk.
    await using file = await open(path, 'r+')
    await file.sync()
    await rename(path, mirror)
    report.taken.push(key)
  }
  if (report.taken.length > 0) {
    await syncDirectory(mirrors)
    await syncDirectory(join(directory, 'preseed'))
  }
  return report
}
