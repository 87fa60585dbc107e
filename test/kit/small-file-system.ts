import { execFile } from 'node:child_process'
import { rm, stat, statfs, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { errorCode } from '../../core/errors/index.ts'
import { temporaryDirectory } from '../../agent/journal/testing.ts'

const run = promisify(execFile)

/** A file system in memory of that size; a test fills it. Needs root. */
export const smallFileSystem = async (sizeMib: number): Promise<AsyncDisposable & { path: string }> => {
  const directory = await temporaryDirectory()
  await run('mount', ['-t', 'tmpfs', '-o', `size=${sizeMib}m`, 'cdp-test', directory.path])
  return {
    path: directory.path,
    [Symbol.asyncDispose]: async () => {
      await run('umount', [directory.path])
      await directory[Symbol.asyncDispose]()
    },
  }
}

/** Leaves so many bytes free on the file system of `directory`. @returns what makes room again */
export const fillUp = async (directory: string, leaveBytes: number): Promise<() => Promise<void>> => {
  const ballast = join(directory, 'ballast')
  const { bavail, bsize } = await statfs(directory)
  try {
    await writeFile(ballast, Buffer.alloc(Math.max(0, bavail * bsize - leaveBytes)))
  } catch (error) {
    // Somebody else wrote meanwhile: what there was is taken, but for what is to be left.
    if (errorCode(error) !== 'ENOSPC') throw error
    await truncate(ballast, Math.max(0, (await stat(ballast)).size - leaveBytes))
  }
  return () => rm(ballast)
}
