import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError, errorCode } from '../../core/errors/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'

/** What a point needs of vm.json (docs/format.md, Mirror). */
export type BaseState = { vm: string; baseComplete: boolean; baseSeq: number; disks: DiskEntry[] }

const isDisk = (value: unknown): value is DiskEntry => {
  const disk = value as Partial<DiskEntry> | null
  return typeof disk === 'object' && disk !== null && Number.isSafeInteger(disk.disk) && typeof disk.key === 'string' && Number.isSafeInteger(disk.sizeBytes)
}

/** @throws CdpError NOT_FOUND if the VM has no replica here, FORMAT */
export const readBaseState = async (vmDirectory: string): Promise<BaseState> => {
  const path = join(vmDirectory, 'vm.json')
  try {
    const json = JSON.parse(await readFile(path, 'utf8')) as Partial<BaseState> & { format?: unknown }
    if (json.format !== 1 || typeof json.vm !== 'string' || typeof json.baseComplete !== 'boolean' || !Number.isSafeInteger(json.baseSeq) || !json.disks?.every(isDisk)) {
      throw new CdpError('FORMAT', 'vm.json is not what it should be', { context: { path } })
    }
    return json as BaseState
  } catch (error) {
    if (errorCode(error) === 'ENOENT') throw new CdpError('NOT_FOUND', 'this VM has no replica here', { cause: error, context: { path } })
    if (errorCode(error) !== undefined) throw error
    throw new CdpError('FORMAT', 'vm.json is not JSON', { cause: error, context: { path } })
  }
}

export const mirrorPath = (vmDirectory: string, disk: number): string => join(vmDirectory, 'mirror', `${disk}.raw`)
