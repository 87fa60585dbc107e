/** A member that nobody protects: its configuration is gone, or its node's plugin does not say that it does. */
export type MemberNews = { vmId: number; is: 'unprotected'; why: string } | { vmId: number; is: 'back' }

/** A VM that moves, or a plugin that is started again, is without protection for a moment: so long, that is nothing to be told. */
const GRACE_MS = 5_000

/** Sees to it that a member without protection is told of, once, and again when it is over. No clock of its own. */
export class MemberWatch {
  readonly #troubled = new Map<number, { sinceMs: number; told: boolean }>()

  /** @param troubles why, by VM id, as of now; @param nowMs monotonic */
  look(troubles: ReadonlyMap<number, string>, nowMs: number): MemberNews[] {
    const news: MemberNews[] = []
    for (const [vmId, { told }] of this.#troubled) {
      if (troubles.has(vmId)) continue
      this.#troubled.delete(vmId)
      if (told) news.push({ vmId, is: 'back' })
    }
    for (const [vmId, why] of troubles) {
      const known = this.#troubled.get(vmId) ?? { sinceMs: nowMs, told: false }
      this.#troubled.set(vmId, known)
      if (known.told || nowMs - known.sinceMs < GRACE_MS) continue
      known.told = true
      news.push({ vmId, is: 'unprotected', why })
    }
    return news
  }
}
