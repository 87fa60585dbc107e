import { statfs } from 'node:fs/promises'

/** Bytes that may still be written below `directory`. */
export const freeBytes = async (directory: string): Promise<number> => {
  const { bavail, bsize } = await statfs(directory)
  return bavail * bsize
}
