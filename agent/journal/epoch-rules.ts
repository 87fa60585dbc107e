import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError, errorCode } from '../../core/errors/index.ts'
import { NO_DISK, SECTOR_BYTES } from '../../core/record/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import { mirrorFileName } from '../mirror/index.ts'

const exists = async (path: string): Promise<boolean> => {
  try {
    await stat(path)
    return true
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return false
    throw error
  }
}

const conflict = (message: string, disk: DiskEntry): CdpError =>
  new CdpError('CONFLICT', message, { hint: 'Give the disk a number of its own, or delete the replica of this VM and begin anew.', context: { disk: disk.disk, key: disk.key } })

/**
 * The disks of an attach, checked against those of the one before: a disk keeps its number and key and never shrinks, and a new
 * disk never takes the number of one that was removed, because its mirror is still there.
 * @throws CdpError BAD_INPUT or CONFLICT
 */
export const admitDisks = async (directory: string, known: readonly DiskEntry[], disks: readonly DiskEntry[]): Promise<DiskEntry[]> => {
  const numbers = new Set<number>()
  const keys = new Set<string>()
  for (const disk of disks) {
    const whole = Number.isInteger(disk.disk) && disk.disk >= 0 && disk.disk < NO_DISK && Number.isSafeInteger(disk.sizeBytes) && disk.sizeBytes > 0
    if (!whole || disk.sizeBytes % SECTOR_BYTES !== 0 || numbers.has(disk.disk) || keys.has(disk.key)) {
      throw new CdpError('BAD_INPUT', 'a disk of the VM has an impossible number, key or size', { context: { disk: disk.disk, key: disk.key, sizeBytes: disk.sizeBytes } })
    }
    numbers.add(disk.disk)
    keys.add(disk.key)
    const before = known.find((one) => one.disk === disk.disk)
    if (before === undefined) {
      if (await exists(join(directory, 'mirror', mirrorFileName(disk.disk)))) throw conflict('the number of the disk belonged to a disk that was removed', disk)
    } else {
      if (before.key !== disk.key) throw conflict('the number of the disk belongs to another disk', disk)
      if (disk.sizeBytes < before.sizeBytes) throw conflict('the disk is smaller than its replica', disk)
    }
  }
  return disks.map(({ disk, key, sizeBytes }) => ({ disk, key, sizeBytes }))
}

export const storeFull = (vm: string, cause: unknown): CdpError =>
  new CdpError('IO', 'the file system of the journal is full', {
    cause,
    retry: true,
    hint: 'Give the recovery site more space or shorten the history; replication goes on by itself when there is room.',
    context: { vm, condition: 'full' },
  })
