import { CdpError } from '../../core/errors/index.ts'
import type { VerifyOptions, VerifyReport } from './verify-procedure.ts'

/** At most one online verify of a VM at a time, which can be ended from outside at any moment. */
export class OnlineVerify {
  readonly #vmId: number
  #running: { abort: AbortController; comparedBytes: number } | undefined

  constructor(vmId: number) {
    this.#vmId = vmId
  }

  /** What was read so far by the one that runs. */
  get comparedBytes(): number | undefined {
    return this.#running?.comparedBytes
  }

  /** @throws CdpError CONFLICT if one runs; ABORTED if it is ended; what `work` throws */
  async run(work: (options: Pick<VerifyOptions, 'signal' | 'onProgress'>) => Promise<VerifyReport>): Promise<VerifyReport> {
    if (this.#running !== undefined) throw new CdpError('CONFLICT', `a verify of VM ${this.#vmId} is under way`, { hint: 'See "pvecdp status".' })
    const running = { abort: new AbortController(), comparedBytes: 0 }
    this.#running = running
    try {
      return await work({ signal: running.abort.signal, onProgress: (comparedBytes) => (running.comparedBytes = comparedBytes) })
    } finally {
      this.#running = undefined
    }
  }

  /** Something else goes first. */
  end(why: string): void {
    this.#running?.abort.abort(new CdpError('ABORTED', why, { retry: true }))
  }
}
