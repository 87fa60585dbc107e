import { createHash } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'
import { checkCut, describeViolation, type CutBracket, type CutReport, type WriteHistory } from '../../agent/proof/index.ts'
import { agentApi, type Checkpoint } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import type { Random } from '../kit/random.ts'
import { until, type Sites } from '../lab/sites.ts'
import { parsePointUri, readRegions } from './read-point.ts'
import { VPG, type ProofDisk } from './rig.ts'

export type InspectorOptions = { sites: Sites; history: WriteHistory; disks: readonly ProofDisk[]; brackets: ReadonlyMap<string, CutBracket>; say: (line: string) => void }

/** Opens checkpoints as they become valid, one after the other, in the agent, while everything goes on, and judges them. */
export class Inspector {
  readonly totals = { checkpoints: 0, bracketed: 0, violations: 0, tornUnderWay: 0, visibleWrites: 0, requiredWrites: 0 }
  /** Ids of those that were inspected, in order, with their verdict. */
  readonly inspected: { id: string; violations: number }[] = []
  readonly #options: InspectorOptions
  readonly #checksums = new Map<string, string>()
  readonly #seen = new Set<string>()
  #newestUnixMs = 0

  constructor(options: InspectorOptions) {
    this.#options = options
  }

  /** Inspects until `count` are done. @throws CdpError TIMEOUT if `deadlineMs` passes without a new valid checkpoint */
  async run(count: number, deadlineMs: number, onProgress: () => Promise<void>): Promise<void> {
    let lastFoundMs = performance.now()
    while (this.totals.checkpoints < count) {
      const found = await this.#newValid()
      if (found.length === 0) {
        if (performance.now() - lastFoundMs > deadlineMs) throw new CdpError('TIMEOUT', `no new valid checkpoint for ${deadlineMs / 1000} s; ${this.totals.checkpoints} were inspected`)
        await delay(50)
        continue
      }
      for (const checkpoint of found) {
        if (this.totals.checkpoints >= count) break
        await this.inspect(checkpoint.id)
        await onProgress()
      }
      lastFoundMs = performance.now()
    }
  }

  /** Judges some earlier checkpoints again: what lies above them has been written, sealed and merged since, and they must show the same. */
  async reopen(count: number, random: Random): Promise<number> {
    const chosen = Array.from({ length: count }, () => this.inspected[random.int(0, this.inspected.length)].id)
    for (const id of chosen) {
      const { checksum } = await this.#judge(id)
      if (checksum === this.#checksums.get(id)) continue
      this.totals.violations++
      this.#options.say(`VIOLATION in ${id}: opened again, it shows other bytes than before`)
    }
    return count
  }

  /** Opens, reads, judges and counts one checkpoint. */
  async inspect(id: string): Promise<CutReport> {
    const { report, checksum } = await this.#judge(id)
    const { totals } = this
    totals.checkpoints++
    if (this.#options.brackets.has(id)) totals.bracketed++
    totals.tornUnderWay += report.tornUnderWay
    totals.visibleWrites += report.visibleWrites
    totals.requiredWrites += report.requiredWrites
    this.inspected.push({ id, violations: report.violationCount })
    this.#checksums.set(id, checksum)
    return report
  }

  /** The disks' content as far as it is stamped is in `checksum`. */
  async #judge(id: string): Promise<{ report: CutReport; checksum: string }> {
    const { sites, disks, history, brackets, say } = this.#options
    const point = await sites.openPoint(VPG, id)
    const places = disks.map(({ vmId, key }) => {
      const uri = point.disks.find((disk) => disk.vmId === vmId && disk.key === key)?.uri
      if (uri === undefined) throw new CdpError('NOT_FOUND', `checkpoint ${id} has no disk ${vmId} ${key}`)
      return parsePointUri(uri)
    })
    const images = await readRegions(places[0].socketPath, places.map(({ exportName }) => exportName))
    // The server hears of a disconnect a moment after the client.
    await until(`point ${point.pointId} closes`, 10_000, async () => {
      try {
        await sites.closePoint(point.pointId)
        return true
      } catch (error) {
        if (error instanceof CdpError && error.code === 'CONFLICT') return undefined
        throw error
      }
    })
    const report = checkCut(history, images, brackets.get(id))
    this.totals.violations += report.violationCount
    for (const violation of report.violations.slice(0, 5)) say(`VIOLATION in ${id}: ${describeViolation(violation)}`)
    const hash = createHash('sha1')
    for (const image of images) hash.update(image)
    return { report, checksum: hash.digest('hex') }
  }

  async #newValid(): Promise<Checkpoint[]> {
    const { checkpoints } = await this.#options.sites.agent.api.call(agentApi.listCheckpoints, { params: { name: VPG }, query: { limit: 10_000, fromUnixMs: this.#newestUnixMs } })
    const valid = checkpoints.filter(({ id, state }) => state !== 'pending' && !this.#seen.has(id)).reverse()
    for (const { id } of valid) this.#seen.add(id)
    // What is still pending is younger than this, or will never be valid.
    this.#newestUnixMs = Math.max(this.#newestUnixMs, (checkpoints[0]?.atUnixMs ?? 0) - 10_000)
    return valid
  }
}
