import { randomBytes } from 'node:crypto'
import { chmod, mkdir, open, readFile, rename, rm, stat } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { CdpError, errorCode, errorMessage } from '../errors/index.ts'

/** Makes the directory with mode 0700, and takes other modes away from one that is there. */
export const ensurePrivateDirectory = async (path: string): Promise<void> => {
  try {
    await mkdir(path, { recursive: true, mode: 0o700 })
    if (((await stat(path)).mode & 0o077) !== 0) await chmod(path, 0o700)
  } catch (error) {
    throw new CdpError('IO', `cannot prepare ${path}: ${errorMessage(error)}`, { cause: error, context: { path } })
  }
}

/** Replaces a file as a whole, mode 0600, durable when this returns: written beside it, fsync, rename, fsync of the directory. */
export const writePrivateFile = async (path: string, text: string): Promise<void> => {
  const directory = dirname(path)
  const draft = join(directory, `.${basename(path)}.${randomBytes(6).toString('hex')}`)
  try {
    const file = await open(draft, 'wx', 0o600)
    try {
      await file.writeFile(text)
      await file.sync()
    } finally {
      await file.close()
    }
    await rename(draft, path)
    await syncDirectory(directory)
  } catch (error) {
    await rm(draft, { force: true })
    throw new CdpError('IO', `cannot write ${path}: ${errorMessage(error)}`, { cause: error, context: { path } })
  }
}

/** The text of a file that only its owner may read; undefined if there is none. A file that others may read is refused. */
export const readPrivateFile = async (path: string): Promise<string | undefined> => {
  try {
    if (((await stat(path)).mode & 0o077) !== 0) {
      throw new CdpError('IO', `${path} holds a secret but can be read by others`, {
        hint: `Find out who could read it, then: chmod 600 ${path}`,
        context: { path },
      })
    }
    return await readFile(path, 'utf8')
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return undefined
    throw error instanceof CdpError ? error : new CdpError('IO', `cannot read ${path}: ${errorMessage(error)}`, { cause: error, context: { path } })
  }
}

/** Removes a file durably; nothing happens if there is none. */
export const removePrivateFile = async (path: string): Promise<void> => {
  await rm(path, { force: true })
  await syncDirectory(dirname(path))
}

const syncDirectory = async (path: string): Promise<void> => {
  const directory = await open(path, 'r')
  try {
    await directory.sync()
  } finally {
    await directory.close()
  }
}
