import { join } from 'node:path'
import { errorCode } from '../../core/errors/index.ts'
import { readJsonFile, removeFile, writeJsonFile } from '../../core/files/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import type { CleanStop, StopNote } from './clean-stop.ts'
import type { FileProof } from './file-proof.ts'

const isText = (value: unknown): value is string => typeof value === 'string'
const isCount = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0
const isDisk = (value: unknown): boolean => {
  const { disk, key, sizeBytes } = (value ?? {}) as Partial<DiskEntry>
  return isCount(disk) && isText(key) && isCount(sizeBytes)
}
const isFileProof = (value: unknown): boolean => {
  const { path, device, inode, sizeBytes, ctimeNs } = (value ?? {}) as Partial<FileProof>
  return [path, device, inode, sizeBytes, ctimeNs].every(isText)
}
const isClean = (value: unknown): value is CleanStop => {
  const { bootId, epoch, lastSeq, disks, files } = (value ?? {}) as Partial<CleanStop>
  if (!isText(bootId) || !isCount(epoch) || !isCount(lastSeq) || !Array.isArray(disks) || disks.length === 0 || !disks.every(isDisk)) return false
  return typeof files === 'object' && (disks as DiskEntry[]).every(({ key }) => isFileProof(files[key]))
}

/** The note of one VM's last stop, on disk. */
export class StopNoteFile {
  readonly #path: string

  constructor(stateDirectory: string, vmId: number) {
    this.#path = join(stateDirectory, `stopped-${vmId}.json`)
  }

  /** What makes no sense is no note: a sync is the answer. */
  async read(): Promise<StopNote | undefined> {
    const file = (await readJsonFile(this.#path).catch((error: unknown) => {
      if (errorCode(error) === 'FORMAT') return undefined
      throw error
    })) as { format?: unknown; clean?: unknown; whyNot?: unknown } | undefined
    if (file?.format !== 1) return undefined
    if (isText(file.whyNot)) return { format: 1, whyNot: file.whyNot }
    return isClean(file.clean) ? { format: 1, clean: file.clean } : undefined
  }

  async write(note: StopNote): Promise<void> {
    await writeJsonFile(this.#path, note)
  }

  async forget(): Promise<void> {
    await removeFile(this.#path)
  }
}
