import { join } from 'node:path'
import { errorCode } from '../../core/errors/index.ts'
import { readJsonFile, removeFile, writeJsonFile } from '../../core/files/index.ts'

/**
 * What the plugin has to know of a VM after a crash, written before it acts. `instance` is the QEMU process whose dirty bitmaps it speaks of.
 * - `attaching`: something of ours may be half done in QEMU.
 * - `copying`: the bitmaps record since the beginning of a first or full copy that has not come to its end.
 * - `covered`: everything that is not in the bitmaps is durable at the agent.
 */
export type VmMemory = { format: 1; instance: string; bitmaps: 'attaching' | 'copying' | 'covered' }

export class VmMemoryFile {
  readonly #path: string

  constructor(stateDirectory: string, vmId: number) {
    this.#path = join(stateDirectory, `vm-${vmId}.json`)
  }

  /** What is known of that QEMU process; undefined if nothing is: its bitmaps then prove nothing. */
  async read(instance: string): Promise<VmMemory | undefined> {
    const memory = (await readJsonFile(this.#path).catch((error: unknown) => {
      // Not readable is not known: a full sync is the answer, not a VM without protection.
      if (errorCode(error) === 'FORMAT') return undefined
      throw error
    })) as VmMemory | undefined
    return memory?.format === 1 && memory.instance === instance ? memory : undefined
  }

  async write(instance: string, bitmaps: VmMemory['bitmaps']): Promise<void> {
    await writeJsonFile(this.#path, { format: 1, instance, bitmaps } satisfies VmMemory)
  }

  async forget(): Promise<void> {
    await removeFile(this.#path)
  }
}
