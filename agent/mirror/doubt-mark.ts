import { readFile } from 'node:fs/promises'
import { errorCode } from '../../core/errors/index.ts'
import { readBootId, removeFile, writeFileDurably } from '../../core/files/index.ts'

// An fdatasync of a mirror file failed: the kernel may hold as clean what is on no disk, and shows it until it drops the page.
// Only a new boot is sure to have dropped it, so the mark FILE.doubt names the boot. This process remembers also where no mark can be written.

const doubted = new Set<string>()
const markOf = (path: string): string => `${path}.doubt`
const thisBoot = async (): Promise<string> => (await readBootId()) ?? 'unknown'

/** What is read of this file may stand in memory only. */
export const isDoubted = async (path: string): Promise<boolean> => {
  if (doubted.has(path)) return true
  let boot: string
  try {
    boot = await readFile(markOf(path), 'utf8')
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return false
    throw error
  }
  if (boot === (await thisBoot())) return true
  await removeFile(markOf(path))
  return false
}

/** Never fails: the disk that failed may be the one of the mark. */
export const noteDoubt = async (path: string): Promise<void> => {
  if (doubted.has(path)) return
  doubted.add(path)
  await writeFileDurably(markOf(path), await thisBoot()).catch(() => undefined)
}
