import { join } from 'node:path'
import type { EventLog } from '../../core/api/index.ts'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { cronExpression } from '../checkpoint/index.ts'
import { joinSite, loadPairing } from '../pairing/index.ts'
import type { Pairing } from '../pairing/index.ts'
import { Vpg, vmExists } from '../protect/index.ts'
import type { ProtectSettings, VpgDefinition } from '../protect/index.ts'
import { VpgBook } from './vpg-book.ts'

export type PluginServiceOptions = {
  siteId: string
  settings: ProtectSettings
  vpgFile: string
  log: Logger
  events: EventLog
}

/** The plugin's VPGs, and the pairing they need: made, started, ended one change at a time. */
export class PluginService implements AsyncDisposable {
  readonly #options: PluginServiceOptions
  readonly #book: VpgBook
  readonly #vpgs = new Map<string, Vpg>()
  #pairing: Pairing | undefined
  #changes: Promise<unknown> = Promise.resolve()

  constructor(options: PluginServiceOptions) {
    this.#options = options
    this.#book = new VpgBook(options.vpgFile)
  }

  get siteId(): string {
    return this.#options.siteId
  }

  get pairing(): Pairing | undefined {
    return this.#pairing
  }

  get vpgs(): Vpg[] {
    return [...this.#vpgs.values()]
  }

  /** Takes up what was defined before. A group that cannot be taken up is left alone, loudly: the daemon must run to be repaired. */
  async start(): Promise<void> {
    this.#pairing = await loadPairing(this.#pairingDirectory())
    this.#beginAll(await this.#book.read())
  }

  async pair(token: string): Promise<Pairing> {
    return this.#change(async () => {
      const pairing = await joinSite({ token, siteId: this.siteId, directory: this.#pairingDirectory() })
      this.#pairing = pairing
      this.#options.events.append({ level: 'info', kind: 'site.paired', message: `paired with ${pairing.host}:${pairing.port}`, context: { agentSiteId: pairing.agentSiteId } })
      const definitions = await this.#book.read()
      await Promise.all(this.vpgs.map((vpg) => vpg.stop(true)))
      this.#vpgs.clear()
      this.#beginAll(definitions)
      return pairing
    })
  }

  /** @throws CdpError BAD_INPUT, CONFLICT, NOT_FOUND, NOT_PAIRED; nothing was changed then */
  async createVpg(definition: VpgDefinition): Promise<Vpg> {
    return this.#change(async () => {
      const { name, vmIds } = definition
      cronExpression(definition.checkpointEveryMs)
      const defined = await this.#book.read()
      if (defined.some((other) => other.name === name)) throw new CdpError('CONFLICT', `there is a VPG ${name} already`, { hint: 'Choose another name, or delete that one.' })
      if (this.#pairing === undefined) throw new CdpError('NOT_PAIRED', 'this site is not paired with a recovery site', { hint: 'Run "pvecdp pair token" there and "pvecdp pair join" here.' })
      for (const vmId of vmIds) {
        const owner = defined.find((other) => other.vmIds.includes(vmId))
        if (owner !== undefined) throw new CdpError('CONFLICT', `VM ${vmId} belongs to the VPG ${owner.name}`, { hint: 'A VM can be in one VPG.' })
        if (!(await vmExists(this.#options.settings.paths, vmId))) throw new CdpError('NOT_FOUND', `there is no VM ${vmId} on this node`, { hint: 'See "qm list" for the VMs of this node.' })
      }
      await this.#book.write([...defined, definition])
      return this.#begin(definition)
    })
  }

  /** Ends the protection of a group; what the recovery site holds stays there. */
  async deleteVpg(name: string): Promise<void> {
    await this.#change(async () => {
      const defined = await this.#book.read()
      const vpg = this.#vpgs.get(name)
      const others = defined.filter((other) => other.name !== name)
      if (vpg === undefined && others.length === defined.length) throw noSuchVpg(name)
      await this.#book.write(others)
      this.#vpgs.delete(name)
      await vpg?.stop(false)
      this.#options.events.append({ level: 'info', kind: 'vpg.deleted', message: `protection of ${name} was ended`, context: { vpg: name } })
    })
  }

  /** @throws CdpError NOT_FOUND */
  vpg(name: string): Vpg {
    const vpg = this.#vpgs.get(name)
    if (vpg === undefined) throw noSuchVpg(name)
    return vpg
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#changes.catch(() => undefined)
    await Promise.all(this.vpgs.map((vpg) => vpg.stop(true)))
    this.#vpgs.clear()
  }

  #pairingDirectory(): string {
    return join(this.#options.settings.stateDirectory, 'pairing')
  }

  #beginAll(definitions: readonly VpgDefinition[]): void {
    for (const definition of definitions) {
      try {
        this.#begin(definition)
      } catch (error) {
        this.#vpgs.delete(definition.name)
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
      definition, settings, log,
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
