import { readFile, stat } from 'node:fs/promises'
import { setTimeout as pause } from 'node:timers/promises'
import { errorCode } from '../../core/errors/index.ts'

/**
 * What changes when anybody writes to a file or puts another one in its place. 64-bit fields as decimal strings; `ctimeNs` since 1970.
 * The change time goes by the file system's clock, which may tick as slowly as every 10 ms: a foreign write within the tick of QEMU's own last one is not seen.
 */
export type FileProof = { path: string; device: string; inode: string; sizeBytes: string; ctimeNs: string }
export type NoProof = { none: string }

/** File systems of this host alone: nobody writes to them from elsewhere, and asking them does not hang when a server does. */
const LOCAL: readonly string[] = ['ext2', 'ext3', 'ext4', 'xfs', 'btrfs', 'zfs', 'tmpfs', 'overlay']
/** Above any tick of a file system's clock: from then on another write has another time. */
const SETTLED_MS = 20
const TRIES = 5
const DEADLINE_MS = 2_000

const within = (path: string, point: string): boolean => point === '/' || path === point || path.startsWith(`${point}/`)

/** Type of the file system that a path lies on, by /proc/self/mountinfo (proc(5)); undefined if it names none. Pure. */
export const fileSystemOf = (mountInfo: string, path: string): string | undefined => {
  let found: { point: string; type: string } | undefined
  for (const line of mountInfo.split('\n')) {
    const fields = line.split(' ')
    const end = fields.indexOf('-', 6)
    if (end < 0) continue
    const point = fields[4].replace(/\\([0-7]{3})/g, (_, octal: string) => String.fromCharCode(parseInt(octal, 8)))
    // Of several at one place the last one lies on top.
    if (within(path, point) && point.length >= (found?.point.length ?? 0)) found = { point, type: fields[end + 1] }
  }
  return found?.type
}

const lookAtFile = async (path: string): Promise<FileProof | NoProof> => {
  const type = fileSystemOf(await readFile('/proc/self/mountinfo', 'utf8'), path)
  if (type === undefined || !LOCAL.includes(type)) return { none: `a file system of the type ${type ?? 'unknown'} gives no proof that nobody else wrote` }
  for (let n = 0; n < TRIES; n++) {
    const found = await stat(path, { bigint: true })
    if (!found.isFile()) return { none: 'only files give a proof that nobody else wrote' }
    if (Date.now() - Number(found.ctimeNs / 1_000_000n) >= SETTLED_MS) {
      return { path, device: String(found.dev), inode: String(found.ino), sizeBytes: String(found.size), ctimeNs: String(found.ctimeNs) }
    }
    await pause(SETTLED_MS)
  }
  return { none: 'it is written to, or its time of change lies in the future' }
}

/** The proof of a file as it is now. Never rejects, and ends in time whatever the storage does. */
export const proveFile = async (path: string): Promise<FileProof | NoProof> => {
  const over = new AbortController()
  const late = pause(DEADLINE_MS, { none: 'its storage does not answer' }, { signal: over.signal })
  late.catch(() => undefined)
  try {
    return await Promise.race([lookAtFile(path), late])
  } catch (error) {
    return { none: errorCode(error) === 'ENOENT' ? 'its file is gone' : `its file cannot be looked at (${errorCode(error) ?? 'unknown error'})` }
  } finally {
    over.abort()
  }
}

/** How two looks at a file differ; undefined if they do not. */
export const differenceOf = (before: FileProof, now: FileProof): string | undefined => {
  if (before.path !== now.path) return 'it is another file'
  if (before.device !== now.device || before.inode !== now.inode) return 'its file was replaced'
  if (before.sizeBytes !== now.sizeBytes) return 'the size of its file changed'
  return before.ctimeNs === now.ctimeNs ? undefined : 'its file was changed'
}
