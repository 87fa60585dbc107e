import type { DiskEntry } from '../../core/record/index.ts'
import type { CaptureWorker } from '../capture/index.ts'
import type { DiskCounters, VmLook } from '../qemu/index.ts'
import { CounterProof } from './counter-proof.ts'

const IN_FLIGHT_BYTES = 16 * 1024 * 1024

/** What a look has found. `lost`: not everything is captured; `changed`: the VM has other disks than those captured. */
export type Finding = { is: 'proved'; /** Newest sequence when the look was over. */ seq: number } | { is: 'lost'; why: string } | { is: 'changed'; why: string }

/**
 * Compares what QEMU says with what was captured since one attach: bytes, the guest's way through its block graph, the disks there are. Checkpoints
 * are proved by it; an orphaned job, a write that failed at the source, and disks that came, went or grew are found by it.
 */
export class CaptureProver {
  readonly #worker: Pick<CaptureWorker, 'ask'>
  readonly #disks: readonly DiskEntry[]
  readonly #nowUnixMs: () => number
  readonly #proofs: ReadonlyMap<string, CounterProof>
  #counters: ReadonlyMap<string, DiskCounters> = new Map()
  /** Of the last look. */
  #doubt: string | undefined
  #lookedAtMs = -Infinity

  constructor(options: { worker: Pick<CaptureWorker, 'ask'>; disks: readonly DiskEntry[]; nowUnixMs: () => number }) {
    this.#worker = options.worker
    this.#disks = options.disks
    this.#nowUnixMs = options.nowUnixMs
    this.#proofs = new Map(options.disks.map(({ key }) => [key, new CounterProof(IN_FLIGHT_BYTES)]))
  }

  /**
   * `onFinding` is called in the turn in which a mismatch is marked in the journal: no cut may come between.
   * @throws what `look` throws; nothing was found then
   */
  async check(look: () => Promise<VmLook>, onFinding: (finding: Finding) => void): Promise<Finding> {
    const before = await this.#worker.ask('captured', {})
    const { counters, sizes, drained } = await look()
    const after = await this.#worker.ask('captured', {})
    const disks: Record<string, { writtenBytes: number; capturedBytes: number }> = {}
    let missed: string | undefined
    for (const [key, proof] of this.#proofs) {
      const counter = counters.get(key)
      if (counter === undefined) continue
      const capturedAfterBytes = after.bytes[key]
      const verdict = proof.look({ capturedBeforeBytes: before.bytes[key], capturedAfterBytes, writtenBytes: counter.wrBytes, failedOperations: counter.failedWrOperations, drained })
      disks[key] = { writtenBytes: counter.wrBytes, capturedBytes: capturedAfterBytes }
      if (verdict.missedBytes > 0) missed = `${key}: ${verdict.missedBytes} bytes of the guest's writes were not captured`
      else if (!verdict.ok) missed = `${key}: a write of the guest failed at the source`
      else if (!counter.onPath) missed = `${key}: the guest's writes do not pass capture any more`
    }
    // What came after the question is not proved by its answer; but it is suspect, up to the moment in which no cut is made any more.
    const marked = this.#worker.ask('proof', { mark: { ok: missed === undefined, atUnixMs: this.#nowUnixMs(), disks }, ...(missed === undefined ? { upToSeq: before.seq } : {}) })
    const finding = this.#findingOf(missed, this.#whatChanged(sizes), after.seq)
    this.#counters = counters
    this.#lookedAtMs = performance.now()
    const idle = this.#disks.find(({ key }) => counters.get(key)?.job?.ready !== true)
    this.#doubt = finding.is === 'proved' ? idle && `the job of ${idle.key} was not ready` : finding.why
    onFinding(finding)
    await marked
    return finding
  }

  /** From then on what was written and is not captured is told. */
  get looked(): boolean {
    return this.#lookedAtMs > -Infinity
  }

  /** Why the last look is no proof that all was captured up to it; undefined if it is one. @param maxAgeMs older ones prove nothing any more */
  doubt(maxAgeMs: number): string | undefined {
    const ageMs = performance.now() - this.#lookedAtMs
    return this.#doubt ?? (ageMs > maxAgeMs ? `QEMU's counters were looked at ${ageMs === Infinity ? 'never' : `${Math.round(ageMs / 1000)} s before`}` : undefined)
  }

  /** Why it is not certain that everything was captured that was written since QEMU began; undefined if it is. @param capturedBefore captured bytes by disk key when capture was attached */
  missedSinceStart(capturedBefore: Readonly<Record<string, number>>): string | undefined {
    for (const [key, proof] of this.#proofs) {
      const counters = this.#counters.get(key)
      if (counters === undefined) return `QEMU's counters of ${key} were not seen`
      if (counters.failedWrOperations > 0 || counters.failedUnmapOperations > 0) return `${key}: a write of the guest failed at the source`
      // Trims after the attach end at the mirror's filter, and cannot be told from those before.
      if (counters.unmapBytes > 0) return `${key}: the guest trimmed it before capture was attached`
      const missedBytes = proof.uncapturedAtMostBytes + capturedBefore[key]
      if (missedBytes !== 0) return `${key}: the guest wrote before capture was attached, or too fast to tell`
    }
    return undefined
  }

  #findingOf(missed: string | undefined, changed: string | undefined, seq: number): Finding {
    if (missed !== undefined) return { is: 'lost', why: missed }
    return changed === undefined ? { is: 'proved', seq } : { is: 'changed', why: changed }
  }

  #whatChanged(sizes: ReadonlyMap<string, number>): string | undefined {
    const added = [...sizes.keys()].filter((key) => !this.#disks.some((disk) => disk.key === key))
    const removed = this.#disks.filter(({ key }) => !sizes.has(key)).map(({ key }) => key)
    const resized = this.#disks.filter(({ key, sizeBytes }) => sizes.has(key) && sizes.get(key) !== sizeBytes).map(({ key }) => key)
    const said = [[added, 'added'], [removed, 'removed'], [resized, 'resized']] as const
    const parts = said.filter(([keys]) => keys.length > 0).map(([keys, what]) => `${keys.join(', ')} ${what}`)
    return parts.length === 0 ? undefined : `disk ${parts.join('; ')}`
  }
}
