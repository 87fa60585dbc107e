import { setTimeout as delay } from 'node:timers/promises'
import { checkCut, describeViolation, type CutBracket, type CutReport, type WriteHistory } from '../../agent/proof/index.ts'
import { agentApi, type Checkpoint } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
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
  readonly #seen = new Set<string>()
  #newestUnixMs = 0

  constructor(options: InspectorOptions) {
    this.#options = options
  }

  /** Inspects until `count` are done. @throws CdpError TIMEOUT if `deadlineMs` passes without a new valid checkpoint */
  async run(count: number, deadlineMs: number, onProgress: () => void): Promise<void> {
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
        await this.inspect(checkpoint)
        onProgress()
      }
      lastFoundMs = performance.now()
    }
  }

  async inspect({ id }: Checkpoint): Promise<CutReport> {
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
    const bracket = brackets.get(id)
    const report = checkCut(history, images, bracket)
    const { totals } = this
    totals.checkpoints++
    if (bracket !== undefined) totals.bracketed++
    totals.violations += report.violationCount
    totals.tornUnderWay += report.tornUnderWay
    totals.visibleWrites += report.visibleWrites
    totals.requiredWrites += report.requiredWrites
    this.inspected.push({ id, violations: report.violationCount })
    for (const violation of report.violations.slice(0, 5)) say(`VIOLATION in ${id}: ${describeViolation(violation)}`)
    return report
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
