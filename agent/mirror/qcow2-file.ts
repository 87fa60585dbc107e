import { execFile } from 'node:child_process'
import { mkdir, open, rename, rm, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { promisify } from 'node:util'
import { CdpError, errorCode, errorMessage } from '../../core/errors/index.ts'

const run = promisify(execFile)
const DEADLINE_MS = 60_000

const qemuImg = async (args: readonly string[], what: string): Promise<string> => {
  try {
    return (await run('qemu-img', [...args], { timeout: DEADLINE_MS, killSignal: 'SIGKILL' })).stdout
  } catch (cause) {
    const said = errorMessage(cause).trim().split('\n').at(-1) ?? ''
    const full = said.includes('No space left on device')
    throw new CdpError('IO', `${what}: ${said}`, { cause, retry: true, hint: 'qemu-img (package qemu-utils) and room on that storage are needed.', ...(full ? { context: { condition: 'full' } } : {}) })
  }
}

export const fileExists = async (path: string): Promise<boolean> => {
  try {
    await stat(path)
    return true
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return false
    throw error
  }
}

/** Makes an empty qcow2, durably; one that is there is replaced. @throws CdpError IO, with context.condition 'full' */
export const makeQcow2 = async (path: string, sizeBytes: number): Promise<void> => {
  await mkdir(dirname(path), { recursive: true, mode: 0o750 })
  const fresh = `${path}.new`
  await rm(fresh, { force: true })
  await qemuImg(['create', '-q', '-f', 'qcow2', fresh, String(sizeBytes)], `the mirror ${path} cannot be made`)
  await syncPath(fresh)
  await rename(fresh, path)
  await syncPath(dirname(path))
}

/** What a qcow2 that an operator claims has to be. @returns its size in bytes @throws CdpError CONFLICT */
export const checkQcow2 = async (path: string, diskBytes: number): Promise<number> => {
  const json = JSON.parse(await qemuImg(['info', '--output=json', '-U', path], `${path} cannot be taken as a mirror`)) as Record<string, unknown>
  const sizeBytes = Number(json['virtual-size'])
  const why = json.format !== 'qcow2' ? 'is no qcow2' : json['backing-filename'] !== undefined ? 'has a backing file' : sizeBytes > diskBytes ? 'is larger than its disk' : undefined
  if (why !== undefined) throw new CdpError('CONFLICT', `${path} ${why}`, { hint: 'Convert the image of the disk into it with qemu-img convert, or name another file.', context: { path, sizeBytes, diskBytes } })
  return sizeBytes
}

const syncPath = async (path: string): Promise<void> => {
  await using handle = await open(path, 'r')
  await handle.sync()
}
