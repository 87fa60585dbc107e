import { open } from 'node:fs/promises'
import { join } from 'node:path'

/** Of a unix socket (sun_path). */
const MAX_PATH_BYTES = 107

export const NBD_SOCKET = 'nbd.sock'
export const QMP_SOCKET = 'qmp.sock'

/** Runs `work` with a path to a socket of `directory` that is short enough to connect to. */
export const withSocketPath = async <T>(directory: string, name: string, work: (path: string) => Promise<T>): Promise<T> => {
  const path = join(directory, name)
  if (Buffer.byteLength(path) <= MAX_PATH_BYTES) return work(path)
  await using handle = await open(directory, 'r')
  return await work(`/proc/self/fd/${handle.fd}/${name}`)
}
