/**
 * What is done to a VM, one thing after the other. One kind of work is so long that it leaves the line once it has begun: everything that is asked for later
 * waits for its end, which whoever asks has to bring about, except for what may be done beside it.
 */
export class WorkLine {
  #last: Promise<unknown> = Promise.resolve()
  #long: Promise<unknown> = Promise.resolve()

  /** @throws what `work` throws; the line goes on */
  run<T>(work: () => Promise<T>): Promise<T> {
    return this.runBeside(async () => {
      await this.#long
      return work()
    })
  }

  /** Also while a long work goes on. */
  runBeside<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#last.then(work)
    this.#last = result.catch(() => undefined)
    return result
  }

  /** Begins when nothing else is done, and another long work is over. */
  async runLong<T>(work: () => Promise<T>): Promise<T> {
    const { result } = await this.run(async () => {
      const begun = work()
      this.#long = begun.catch(() => undefined)
      return { result: begun }
    })
    return result
  }

  /** Resolves when everything asked for until now is over. */
  idle(): Promise<void> {
    return this.run(async () => undefined)
  }
}
