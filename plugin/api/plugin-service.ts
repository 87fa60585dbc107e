import type { EventLog } from '../../core/api/index.ts'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { cronExpression } from '../checkpoint/index.ts'
import type { Cluster, NodeHandlers } from '../cluster/index.ts'
import { joinSite, loadPairing } from '../pairing/index.ts'
import type { Pairing } from '../pairing/index.ts'
import { BandwidthKeeper, VerifyRecords, VerifySchedule, Vpg } from '../protect/index.ts'
import type { LineUser, ProtectSettings, VpgDefinition, VpgPeers } from '../protect/index.ts'
import type { Discards, ReclaimSchedule, ReclaimSettings } from '../reclaim/index.ts'
import type { Bandwidth } from '../replicate/index.ts'
import { reclaimScheduleOf } from './reclaim-schedule-of.ts'
import { VpgBook } from './vpg-book.ts'
import { memberReport } from './vpg-status.ts'

export type PluginServiceOptions = {
  cluster: Cluster
  settings: ProtectSettings
  /** Where pairing.json is: with all that the nodes of the cluster share. */
  siteDirectory: string
  vpgFile: string
  /** See VpgOptions. */
  holdMs: number
  /** The node's limit; none if it is absent. */
  bandwidth?: Bandwidth
  /** Never, if it is absent. */
  reclaim?: ReclaimSettings
  log: Logger
  events: EventLog
}

const LOOK_EVERY_MS = 1_000

/**
 * The plugin's VPGs, and the pairing they need: made, started, ended one change at a time. Definitions and pairing belong to the cluster:
 * what another node wrote is taken up within a second or two.
 */
export class PluginService implements AsyncDisposable {
  readonly #options: PluginServiceOptions
  readonly #book: VpgBook
  readonly #vpgs = new Map<string, Vpg>()
  readonly #verifySchedule: VerifySchedule
  /** Results of online verifies. */
  readonly verifies: VerifyRecords
  readonly #reclaim: ReclaimSchedule
  readonly #bandwidth: BandwidthKeeper
  #pairing: Pairing | undefined
  #changes: Promise<unknown> = Promise.resolve()
  #look: NodeJS.Timeout | undefined
  #looking = false
  #nodeOf: ReadonlyMap<number, string> = new Map()
  #trouble = ''
  /** Definitions that could not be taken up, so that it is said once. */
  readonly #bad = new Set<string>()

  constructor(options: PluginServiceOptions) {
    this.#options = options
    this.#book = new VpgBook(options.vpgFile)
    this.#bandwidth = new BandwidthKeeper({ bandwidth: options.bandwidth ?? { bytesPerSec: 0, windows: [] }, users: () => this.#lineUsers() })
    const { settings, log, events } = options
    this.#reclaim = reclaimScheduleOf({ reclaim: options.reclaim, settings, log, events, vms: () => this.vpgs.flatMap(({ vms }) => vms) })
    this.verifies = new VerifyRecords(settings.stateDirectory)
    this.#verifySchedule = new VerifySchedule({ everyMs: settings.verify.everyMs, vms: () => this.vpgs.flatMap(({ vms }) => vms), records: this.verifies, log, nowUnixMs: Date.now })
  }

  get siteId(): string {
    return this.#options.cluster.siteId
  }

  /** The name of this node in its cluster. */
  get nodeName(): string {
    return this.#options.cluster.nodeName
  }

  get pairing(): Pairing | undefined {
    return this.#pairing
  }

  /** What QEMU does with a protected guest's discards. */
  get discards(): Discards {
    return this.#reclaim.discards
  }

  /** False while a capture worker does not turn: the watchdog is not fed then. */
  get healthy(): boolean {
    return this.vpgs.every(({ vms }) => vms.every((vm) => !vm.workerHangs))
  }

  get vpgs(): Vpg[] {
    return [...this.#vpgs.values()]
  }

  /** Takes up what was defined before. A group that cannot be taken up is left alone, loudly: the daemon must run to be repaired. */
  async start(): Promise<void> {
    this.#pairing = await loadPairing(this.#options.siteDirectory)
    const definitions = await this.#book.read()
    await this.#findMembers(definitions)
    this.#beginAll(definitions)
    this.#options.cluster.serve(this.#handlers())
    await this.#lookAround()
    this.#verifySchedule.start()
    this.#reclaim.start()
    this.#bandwidth.start()
    this.#look = setInterval(() => void this.#lookAround(), LOOK_EVERY_MS)
  }

  async pair(token: string): Promise<Pairing> {
    return this.#change(async () => {
      const { cluster, siteDirectory } = this.#options
      const pairing = await cluster.locked(() => joinSite({ token, siteId: this.siteId, directory: siteDirectory }))
      this.#options.events.append({ level: 'info', kind: 'site.paired', message: `paired with ${pairing.host}:${pairing.port}`, context: { agentSiteId: pairing.agentSiteId } })
      await this.#usePairing(pairing)
      return pairing
    })
  }

  /** @throws CdpError BAD_INPUT, CONFLICT, NOT_FOUND, NOT_PAIRED; nothing was changed then */
  async createVpg(definition: VpgDefinition): Promise<Vpg> {
    return this.#change(() => this.#options.cluster.locked(async () => {
      const { name, vmIds } = definition
      cronExpression(definition.checkpointEveryMs)
      const defined = await this.#book.read()
      if (defined.some((other) => other.name === name)) throw new CdpError('CONFLICT', `there is a VPG ${name} already`, { hint: 'Choose another name, or delete that one.' })
      if (this.#pairing === undefined) throw new CdpError('NOT_PAIRED', 'this site is not paired with a recovery site', { hint: 'Run "pvecdp pair token" there and "pvecdp pair join" here.' })
      for (const vmId of vmIds) {
        const owner = defined.find((other) => other.vmIds.includes(vmId))
        if (owner !== undefined) throw new CdpError('CONFLICT', `VM ${vmId} belongs to the VPG ${owner.name}`, { hint: 'A VM can be in one VPG.' })
      }
      const placed = await this.#options.cluster.placement(vmIds)
      for (const vmId of vmIds) {
        if (!placed.has(vmId)) throw new CdpError('NOT_FOUND', `there is no VM ${vmId} in this cluster`, { hint: 'See "qm list" on its node.' })
      }
      await this.#book.write([...defined, definition])
      this.#nodeOf = new Map([...this.#nodeOf, ...placed])
      return this.#begin(definition)
    }))
  }

  /**
   * Ends the protection of a group; what the recovery site holds stays there.
   * @throws CdpError NOT_FOUND; CONFLICT while somebody else's operation on a member here keeps capture in its QEMU. Nothing was done then
   */
  async deleteVpg(name: string): Promise<void> {
    await this.#change(() => this.#options.cluster.locked(async () => {
      const defined = await this.#book.read()
      const vpg = this.#vpgs.get(name)
      const others = defined.filter((other) => other.name !== name)
      if (vpg === undefined && others.length === defined.length) throw noSuchVpg(name)
      await vpg?.mustBeTakeable()
      await this.#book.write(others)
      this.#vpgs.delete(name)
      await vpg?.stop(false)
      this.#options.events.append({ level: 'info', kind: 'vpg.deleted', message: `protection of ${name} was ended`, context: { vpg: name } })
    }))
  }

  /** @throws CdpError NOT_FOUND */
  vpg(name: string): Vpg {
    const vpg = this.#vpgs.get(name)
    if (vpg === undefined) throw noSuchVpg(name)
    return vpg
  }

  /** A protected VM of this node. @throws CdpError NOT_FOUND, with the node it is on if that is another one */
  vmHere(vmId: number): Vpg['vms'][number] {
    for (const vpg of this.vpgs) {
      const vm = vpg.vms.find((member) => member.vmId === vmId)
      if (vm !== undefined) return vm
      const node = vpg.view.nodeOf.get(vmId)
      if (node !== undefined) throw new CdpError('NOT_FOUND', `VM ${vmId} is not on this node, but on ${node}`, { hint: `Ask the plugin of ${node}.`, context: { vmId, node } })
    }
    throw new CdpError('NOT_FOUND', `VM ${vmId} is not protected`, { hint: 'See "pvecdp status".', context: { vmId } })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    clearInterval(this.#look)
    this.#bandwidth[Symbol.dispose]()
    this.#verifySchedule[Symbol.dispose]()
    this.#reclaim[Symbol.dispose]()
    await this.#changes.catch(() => undefined)
    await Promise.all(this.vpgs.map((vpg) => vpg.stop(true)))
    this.#vpgs.clear()
  }

  #lineUsers(): LineUser[] {
    return this.vpgs.flatMap(({ definition, vms }) => vms.map(({ rate, stats }) => ({
      rate, priority: definition.priority ?? 'normal', sentBytes: stats?.sentBytes ?? 0, waitingBytes: (stats?.heldBytes ?? 0) + (stats?.spilledBytes ?? 0),
    })))
  }

  /** What another node may have changed: VPGs, the pairing, where members are. Once a second; a look that takes longer skips some. */
  async #lookAround(): Promise<void> {
    if (this.#looking) return
    this.#looking = true
    try {
      await this.#change(() => this.#takeUp())
      this.#trouble = ''
    } catch (error) {
      const trouble = errorMessage(error)
      if (trouble !== this.#trouble) this.#options.log.warn('what the nodes of the cluster share cannot be read', { error: trouble })
      this.#trouble = trouble
    } finally {
      this.#looking = false
    }
  }

  async #takeUp(): Promise<void> {
    const { cluster, siteDirectory } = this.#options
    // A file that is missing says nothing: the cluster file system may not be mounted. A deleted group is one that the file lacks.
    const definitions = (await this.#book.readIfThere()) ?? this.vpgs.map(({ definition }) => definition)
    const pairing = await loadPairing(siteDirectory)
    await this.#findMembers(definitions)
    if (pairing !== undefined && JSON.stringify(pairing) !== JSON.stringify(this.#pairing)) await this.#usePairing(pairing)
    for (const vpg of this.vpgs) {
      const now = definitions.find(({ name }) => name === vpg.definition.name)
      if (now !== undefined && JSON.stringify(now) === JSON.stringify(vpg.definition)) continue
      this.#vpgs.delete(vpg.definition.name)
      await vpg.stop(now !== undefined)
      if (now === undefined) this.#options.events.append({ level: 'info', kind: 'vpg.deleted', message: `protection of ${vpg.definition.name} was ended on another node`, context: { vpg: vpg.definition.name } })
    }
    if (this.#pairing !== undefined) this.#beginAll(definitions.filter(({ name }) => !this.#vpgs.has(name)))
    for (const vpg of this.vpgs) vpg.place(this.#nodeOf)
    await cluster.tend(new Set(this.vpgs.flatMap((vpg) => vpg.otherNodes)))
  }

  async #findMembers(definitions: readonly VpgDefinition[]): Promise<void> {
    this.#nodeOf = await this.#options.cluster.placement(definitions.flatMap(({ vmIds }) => vmIds))
  }

  /** Everything begins again with another recovery site, or with another certificate. */
  async #usePairing(pairing: Pairing): Promise<void> {
    this.#pairing = pairing
    const definitions = await this.#book.read()
    await this.#findMembers(definitions)
    await Promise.all(this.vpgs.map((vpg) => vpg.stop(true)))
    this.#vpgs.clear()
    this.#beginAll(definitions)
  }

  /** What other nodes may ask of this one. */
  #handlers(): NodeHandlers {
    const notHere = { refused: `node ${this.nodeName} has not taken the group up yet` }
    return {
      hold: async ({ vpg, cutId, holdMs }) => (await this.#vpgs.get(vpg)?.part.hold(cutId, holdMs)) ?? notHere,
      commit: async ({ vpg, cutId, mark }) => (mark.vpg !== vpg ? { refused: 'the marker is of another group' } : undefined) ?? (await this.#vpgs.get(vpg)?.part.commit(cutId, mark)) ?? notHere,
      release: async ({ vpg, cutId }) => {
        await this.#vpgs.get(vpg)?.part.release(cutId)
        return {}
      },
      status: async () => ({ vpgs: this.vpgs.map((vpg) => memberReport(vpg, Date.now())) }),
      tag: async ({ vpg, tag }) => this.vpg(vpg).tag(tag, true),
    }
  }

  #peers(): VpgPeers {
    const { cluster } = this.#options
    return {
      nodeName: cluster.nodeName,
      news: (node, vpg) => {
        const report = cluster.report(node)
        return report.known ? { known: true, report: report.vpgs.get(vpg) } : report
      },
      participant: (node) => cluster.participant(node),
      tag: (node, vpg, tag) => cluster.tag(node, vpg, tag),
    }
  }

  #beginAll(definitions: readonly VpgDefinition[]): void {
    for (const definition of definitions) {
      const text = JSON.stringify(definition)
      if (this.#bad.has(text)) continue
      try {
        this.#begin(definition)
      } catch (error) {
        this.#vpgs.delete(definition.name)
        if (this.#pairing !== undefined) this.#bad.add(text)
        const { log, events } = this.#options
        log.error('a VPG is defined and not protected', { vpg: definition.name, error })
        events.append({ level: 'error', kind: 'vpg.not-started', message: `${definition.name} is not protected: ${errorMessage(error)}`, context: { vpg: definition.name } })
      }
    }
  }

  #begin(definition: VpgDefinition): Vpg {
    const { settings, log, events } = this.#options
    const pairing = this.#pairing
    if (pairing === undefined) throw new CdpError('NOT_PAIRED', `the VPG ${definition.name} is defined, but this site is not paired`, { hint: 'Pair it again with "pvecdp pair join".' })
    const vpg = new Vpg({
      definition, settings, log, peers: this.#peers(), nodeOf: this.#nodeOf, holdMs: this.#options.holdMs, verifies: this.verifies,
      agent: { host: pairing.host, port: pairing.port, tls: pairing.tls },
      onEvent: ({ level, kind, message, context }) => void events.append({ level, kind, message, context }),
    })
    this.#vpgs.set(definition.name, vpg)
    vpg.start()
    events.append({ level: 'info', kind: 'vpg.started', message: `${definition.name} is being protected`, context: { vpg: definition.name } })
    return vpg
  }

  /** One change at a time: two operators at once get two answers, in order. */
  async #change<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#changes.then(work)
    this.#changes = result.catch((error: unknown) => this.#options.log.debug('a change was refused', { error: errorMessage(error) }))
    return result
  }
}

const noSuchVpg = (name: string): CdpError => new CdpError('NOT_FOUND', `there is no VPG ${name}`, { hint: 'See "pvecdp vpg list".' })
