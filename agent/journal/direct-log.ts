import { join } from 'node:path'
import { RecordKind } from '../../core/record/index.ts'
import { MirrorSet } from '../mirror/index.ts'
import type { MirrorStorage } from '../mirror/index.ts'
import type { QueuedFrame } from './frame-queue.ts'
import { resized, saveVmState, syncDirectory } from './vm-state.ts'
import type { VmState } from './vm-state.ts'

export const DIRECT_COMMIT_BYTES = 8 * 1024 * 1024
export const DIRECT_COMMIT_MS = 20

/** Applies the frames of an initial sync to the mirror. What was applied since the last `commit` is not durable. */
export class DirectLog implements AsyncDisposable {
  readonly #mirrors: MirrorSet
  readonly #statePath: string
  #pending: VmState

  private constructor(mirrors: MirrorSet, statePath: string, state: VmState) {
    this.#mirrors = mirrors
    this.#statePath = statePath
    this.#pending = state
  }

  static async open(directory: string, storage: MirrorStorage, state: VmState): Promise<DirectLog> {
    const mirrors = await MirrorSet.open(storage, state.disks)
    await syncDirectory(storage.directory)
    await syncDirectory(directory)
    return new DirectLog(mirrors, join(directory, 'vm.json'), state)
  }

  async apply({ frame, endsBase }: QueuedFrame): Promise<void> {
    await this.#mirrors.apply(frame)
    const { table, header } = frame
    const next = { ...this.#pending, directSeq: header.lastSeq }
    for (let index = 0; index < table.count; index++) {
      const kind = table.kind(index)
      if (kind === RecordKind.syncProgress) next.syncProgress = { ...next.syncProgress, [table.disk(index)]: table.offsetBytes(index) }
      else if (kind === RecordKind.resize) next.disks = resized(next.disks, table.disk(index), table.offsetBytes(index))
    }
    if (endsBase) {
      next.baseComplete = true
      next.baseSeq = header.lastSeq
    }
    this.#pending = next
  }

  /** fdatasync of the mirrors, then vm.json; the state answered is durable. */
  async commit(): Promise<VmState> {
    await this.#mirrors.datasync()
    await saveVmState(this.#statePath, this.#pending)
    return this.#pending
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#mirrors[Symbol.asyncDispose]()
  }
}
