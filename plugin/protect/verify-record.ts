import { join } from 'node:path'
import { errorCode } from '../../core/errors/index.ts'
import { readJsonFile, writeJsonFile } from '../../core/files/index.ts'
import type { VerifyReport } from './verify-procedure.ts'

/** What is kept of a VM's newest verify, over restarts of the plugin; `verify-ID.json`. `foundEver`: how many verifies found a difference. */
export type VerifyRecord = { format: 1; atUnixMs: number; comparedBytes: number; undecidedBytes: number; differingBytes: number; foundEver: number }

const isCount = (value: unknown): boolean => Number.isSafeInteger(value) && (value as number) >= 0

export class VerifyRecords {
  readonly #directory: string
  readonly #known = new Map<number, VerifyRecord>()

  constructor(stateDirectory: string) {
    this.#directory = stateDirectory
  }

  /** The newest of a VM, as far as it was read or written in this life. */
  known(vmId: number): VerifyRecord | undefined {
    return this.#known.get(vmId)
  }

  /** A file that cannot be understood counts as none: the next verify writes it anew. */
  async read(vmId: number): Promise<VerifyRecord | undefined> {
    const known = this.#known.get(vmId)
    if (known !== undefined) return known
    const found = (await readJsonFile(this.#path(vmId)).catch((error: unknown) => {
      if (errorCode(error) === 'FORMAT') return undefined
      throw error
    })) as VerifyRecord | undefined
    const isWhole = found?.format === 1 && [found.atUnixMs, found.comparedBytes, found.undecidedBytes, found.differingBytes, found.foundEver].every(isCount)
    if (isWhole) this.#known.set(vmId, found)
    return isWhole ? found : undefined
  }

  async write(vmId: number, atUnixMs: number, { comparedBytes, undecidedBytes, differingBytes }: VerifyReport): Promise<void> {
    const before = await this.read(vmId)
    const record: VerifyRecord = { format: 1, atUnixMs, comparedBytes, undecidedBytes, differingBytes, foundEver: (before?.foundEver ?? 0) + (differingBytes > 0 ? 1 : 0) }
    this.#known.set(vmId, record)
    await writeJsonFile(this.#path(vmId), record)
  }

  #path(vmId: number): string {
    return join(this.#directory, `verify-${vmId}.json`)
  }
}
