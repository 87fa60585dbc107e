import { loadVmState, saveVmState } from './vm-state.ts'
import type { VmState } from './vm-state.ts'

/** vm.json and the state in it. Attaches, commits and promotion change it independently: each change begins where the one before ended. */
export class StateFile {
  readonly path: string
  #state: VmState
  #saving: Promise<unknown> = Promise.resolve()
  /** Changes noted since the save that is under way began. */
  #noted: ((state: VmState) => VmState)[] = []
  #isBehind = false

  constructor(path: string, state: VmState) {
    this.path = path
    this.#state = state
  }

  /** The newest state: what is durable, and what the journal says on top of it. */
  get state(): VmState {
    return this.#state
  }

  /** The file does not say all of it: a change that was noted could not be saved. */
  get isBehind(): boolean {
    return this.#isBehind
  }

  /** Takes over at once what the journal says durably, whatever else is being saved; the next `update` writes it. */
  note(change: (state: VmState) => VmState): void {
    this.#state = change(this.#state)
    this.#noted.push(change)
    this.#isBehind = true
  }

  /** Takes over what somebody else made durable (the initial sync). */
  adopt(state: VmState): void {
    this.#state = state
  }

  /** Makes a change durable; after an error the base is what the file says now. @throws Node's error */
  update(change: (state: VmState) => VmState): Promise<VmState> {
    const saved = this.#saving.then(async () => {
      const next = change(this.#state)
      this.#noted = []
      try {
        await saveVmState(this.path, next)
      } catch (error) {
        // The file may have been replaced before the error: whoever opens a recovery point reads it as it is now.
        const found = await loadVmState(this.path).catch(() => undefined)
        if (found !== undefined) this.#state = { ...this.#state, baseSeq: found.baseSeq, promotingToSeq: found.promotingToSeq }
        throw error
      }
      this.#state = this.#noted.reduce((state, noted) => noted(state), next)
      this.#isBehind = this.#noted.length > 0
      return next
    })
    this.#saving = saved.catch(() => undefined)
    return saved
  }
}
