import { open, readFile, rename, rm } from 'node:fs/promises'
import { dirname } from 'node:path'
import { CdpError, errorCode } from '../errors/index.ts'

/** fsync of a directory: makes a rename or an unlink in it durable. */
const syncDirectory = async (path: string): Promise<void> => {
  const directory = await open(path, 'r')
  try {
    await directory.sync()
  } finally {
    await directory.close()
  }
}

/** Write, fsync, rename, fsync of the directory: the file is the old one or the new one, never a part. */
export const writeFileDurably = async (path: string, content: string | Buffer, mode = 0o600): Promise<void> => {
  const fresh = `${path}.new`
  const file = await open(fresh, 'w', mode)
  try {
    await file.writeFile(content)
    await file.sync()
  } finally {
    await file.close()
  }
  await rename(fresh, path)
  await syncDirectory(dirname(path))
}

export const writeJsonFile = (path: string, value: unknown): Promise<void> => writeFileDurably(path, `${JSON.stringify(value, undefined, 2)}\n`)

/**
 * The parsed content, or undefined if there is no such file.
 * @throws CdpError FORMAT if it is not JSON
 */
export const readJsonFile = async (path: string): Promise<unknown> => {
  let text: string
  try {
    text = await readFile(path, 'utf8')
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return undefined
    throw error
  }
  try {
    return JSON.parse(text)
  } catch (cause) {
    throw new CdpError('FORMAT', `${path} is not JSON`, { cause, hint: 'Restore it from a backup, or remove it to begin anew.' })
  }
}

/** Removes a file durably; nothing happens if there is none. */
export const removeFile = async (path: string): Promise<void> => {
  await rm(path, { force: true })
  await syncDirectory(dirname(path))
}
