import { mkdirSync, mkdtempSync, readdirSync, rmSync, statfsSync } from 'node:fs'
import { CdpError } from '../../core/errors/index.ts'
import { isAlive } from '../../test/lab/index.ts'
import { projectDir } from '../../test/lab/project.ts'

const TMPFS_MAGIC = 0x01021994
const SHARED_MEMORY = '/dev/shm'
const OWNER = /^cdp-bench-(\d+)-/

/** .cache/bench: what is worth keeping from run to run, on a real disk. */
export const benchCacheDirectory = (): string => {
  const directory = `${projectDir()}/.cache/bench`
  mkdirSync(directory, { recursive: true })
  return directory
}

/**
 * A new directory of this run on a real disk: what fdatasync costs on tmpfs says nothing.
 * @throws CdpError IO if there is only memory
 */
export const makeDiskDirectory = (): string => {
  for (const parent of [benchCacheDirectory(), '/var/tmp']) {
    if (statfsSync(parent).type !== TMPFS_MAGIC) return mkdtempSync(`${parent}/cdp-bench-${process.pid}-`)
  }
  throw new CdpError('IO', 'the checkout and /var/tmp both lie in memory', { hint: 'Run the bench from a checkout on a disk: journals are made durable there.' })
}

/** Where the image of a source disk lies: in memory, so that the disk itself is not what is measured. */
export const memoryImagePath = (name: string): string => `${SHARED_MEMORY}/cdp-bench-${process.pid}-${name}.raw`

/** Removes what is left of this process, and of runs that were killed: whatever carries the id of a process that is gone. */
export const sweepLeftovers = ({ own }: { own: boolean }): void => {
  for (const directory of [benchCacheDirectory(), '/var/tmp', '/tmp', SHARED_MEMORY]) {
    for (const name of readdirSync(directory)) {
      const pid = Number(OWNER.exec(name)?.[1] ?? 0)
      if (pid !== 0 && (pid === process.pid ? own : !isAlive(pid))) rmSync(`${directory}/${name}`, { recursive: true, force: true })
    }
  }
}
