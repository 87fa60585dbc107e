import { randomBytes } from 'node:crypto'
import { checkpointSelector } from '../../core/api/index.ts'
import type { EventLog, RecoveryPoint } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import type { Catalogue, CatalogueEntry } from '../checkpoint/index.ts'
import type { VmRegistry } from '../ingest/index.ts'
import type { PointServer } from '../recovery/index.ts'

export type PointDeskOptions = { catalogue: Catalogue; registry: VmRegistry; points: PointServer; events: EventLog }

/** Opens recovery points of whole groups by checkpoint, and remembers which point is of which checkpoint. */
export class PointDesk {
  readonly #options: PointDeskOptions
  readonly #open = new Map<string, RecoveryPoint>()

  constructor(options: PointDeskOptions) {
    this.#options = options
  }

  /** @throws CdpError NOT_FOUND, CONFLICT for a checkpoint that is not valid, JOURNAL_DAMAGED also for one that needs something damaged, unless that is accepted */
  async open(vpg: string, wanted: string | { atUnixMs: number }, options: { acceptDamaged?: boolean } = {}): Promise<RecoveryPoint> {
    const { registry, points, events } = this.#options
    const siteId = this.siteOf(vpg)
    const checkpoint = this.#choose(siteId, vpg, wanted)
    if (checkpoint.state === 'damaged' && options.acceptDamaged !== true) {
      throw new CdpError('JOURNAL_DAMAGED', `checkpoint ${checkpoint.id} needs something that is damaged`, {
        hint: 'Choose another one; or open it with --accept-damaged: reading what is damaged then fails, and all else is whole. See "pvecdp scrub show".', context: { checkpointId: checkpoint.id },
      })
    }
    const pointId = `${checkpoint.id}.${randomBytes(3).toString('hex')}`
    const vms = checkpoint.vms.map((vm) => {
      const store = registry.get(siteId, vm)?.store
      if (store === undefined) throw new CdpError('NOT_FOUND', `the journal of VM ${vm} is not here`, { hint: 'See the log of the agent for why it was not opened.' })
      const seq = checkpoint.namedSeqs[vm]
      return { vm, vmDirectory: store.directory, seq, disks: store.disksAt(seq) }
    })
    const opened = await points.openPoint({ pointId, vms })
    const point: RecoveryPoint = {
      pointId, vpg, checkpointId: checkpoint.id, atUnixMs: checkpoint.atUnixMs,
      disks: opened.disks.map(({ vm, key, sizeBytes, uri }) => ({ vmId: Number(vm), key, sizeBytes, uri })),
    }
    this.#open.set(pointId, point)
    events.append({ level: 'info', kind: 'point.opened', message: `recovery point of ${vpg} at ${new Date(checkpoint.atUnixMs).toISOString()} is open`, context: { vpg, pointId, checkpointId: checkpoint.id } })
    return point
  }

  list(): RecoveryPoint[] {
    return [...this.#open.values()]
  }

  /** @throws CdpError NOT_FOUND, CONFLICT while somebody reads it */
  async close(pointId: string): Promise<void> {
    const { points, events } = this.#options
    if (!(await points.closePoint(pointId))) throw new CdpError('NOT_FOUND', `there is no open recovery point ${pointId}`, { hint: 'See "pvecdp point list".' })
    this.#open.delete(pointId)
    events.append({ level: 'info', kind: 'point.closed', message: `recovery point ${pointId} is closed`, context: { pointId } })
  }

  /** @throws CdpError NOT_FOUND, CONFLICT if two sites have a VPG of that name */
  siteOf(vpg: string): string {
    const sites = this.#options.catalogue.listVpgs().filter(({ name }) => name === vpg)
    if (sites.length === 0) throw new CdpError('NOT_FOUND', `there is no VPG ${vpg} here`, { hint: 'See "pvecdp status" for the VPGs of this agent.' })
    if (sites.length > 1) throw new CdpError('CONFLICT', `${sites.length} sites have a VPG ${vpg}`, { hint: 'Rename one of them.' })
    return sites[0].siteId
  }

  #choose(siteId: string, vpg: string, wanted: string | { atUnixMs: number }): CatalogueEntry {
    const { catalogue } = this.#options
    const selector = checkpointSelector(wanted)
    switch (selector.by) {
      case 'id': {
        const entry = catalogue.find(siteId, vpg, selector.id)
        if (entry === undefined) throw new CdpError('NOT_FOUND', `${vpg} has no checkpoint ${selector.id}`, { hint: `See "pvecdp checkpoint list ${vpg}".` })
        if (entry.state === 'pending') throw new CdpError('CONFLICT', `checkpoint ${selector.id} is not valid yet`, { retry: true, hint: 'Wait until every VM of the group has it, or choose an older one.' })
        return entry
      }
      case 'latest':
        return this.#found(vpg, catalogue.latest(siteId, vpg), 'no valid checkpoint')
      case 'latest-tagged':
        return this.#found(vpg, catalogue.latest(siteId, vpg, { taggedOnly: true }), 'no valid tagged checkpoint')
      case 'time':
        return this.#found(vpg, catalogue.latest(siteId, vpg, { notAfterUnixMs: selector.atUnixMs }), `no valid checkpoint at or before ${new Date(selector.atUnixMs).toISOString()}`)
    }
  }

  #found(vpg: string, entry: CatalogueEntry | undefined, what: string): CatalogueEntry {
    if (entry === undefined) throw new CdpError('NOT_FOUND', `${vpg} has ${what}`, { hint: `See "pvecdp checkpoint list ${vpg}".` })
    return entry
  }
}
