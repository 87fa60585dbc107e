import { loadVmState, saveVmState } from './vm-state.ts'
import type { VmState } from './vm-state.ts'

/** vm.json and the state in it. Attaches, commits and promotion change it independently: each change begins where the one before ended. */
export class StateFile {
  readonly path: string
  #state: VmState
  #saving: Promise<unknown> = Promise.resolve()

  constructor(path: string, state: VmState) {
    this.path = path
    this.#state = state
  }

  /** The newest state that is durable. */
  get state(): VmState {
    return this.#state
  }

  /** Takes over what somebody else made durable (the initial sync), or what the journal says on top of the file. */
  adopt(state: VmState): void {
    this.#state = state
  }

  /** Makes a change durable; after an error the base is what the file says now. @throws Node's error */
  update(change: (state: VmState) => VmState): Promise<VmState> {
    const saved = this.#saving.then(async () => {
      const next = change(this.#state)
      try {
        await saveVmState(this.path, next)
      } catch (error) {
        // The file may have been replaced before the error: whoever opens a recovery point reads it as it is now.
        const found = await loadVmState(this.path).catch(() => undefined)
        if (found !== undefined) this.#state = { ...this.#state, baseSeq: found.baseSeq, promotingToSeq: found.promotingToSeq }
        throw error
      }
      this.#state = next
      return next
    })
    this.#saving = saved.catch(() => undefined)
    return saved
  }
}
