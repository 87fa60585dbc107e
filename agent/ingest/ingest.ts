import type { Duplex } from 'node:stream'
import { CdpError } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { generationError } from '../../core/stream/index.ts'
import type { Hello } from '../../core/stream/index.ts'
import type { Catalogue } from '../checkpoint/index.ts'
import type { HashDesk } from '../hashes/index.ts'
import type { GroupGeneration, GroupGenerations } from './group-generations.ts'
import { StreamReceiver } from './stream-receiver.ts'
import type { VmRegistry } from './vm-registry.ts'

export type IngestOptions = {
  registry: VmRegistry
  catalogue: Catalogue
  /** Who owns which group. */
  generations: GroupGenerations
  log: Logger
  /** See StreamReceiverOptions, both. */
  allocate?: (lengthBytes: number) => Buffer
  hashes?: HashDesk
  /** A stream was refused because it is of another generation than the group. */
  onDisowned?: (siteId: string, hello: Hello, error: CdpError) => void
  /** The stream of a VM begins. */
  onConnected?: (siteId: string, vm: string) => void
}

/** Takes streams over from the listener: one per VM at a time, the newest attach wins. */
export class Ingest implements Disposable {
  readonly #options: IngestOptions
  readonly #streams = new Map<string, StreamReceiver>()
  /** With the site that each is of. */
  readonly #all = new Map<StreamReceiver, string>()

  constructor(options: IngestOptions) {
    this.#options = options
  }

  /** A verified connection of a paired site. */
  take(socket: Duplex, siteId: string): void {
    const { registry, catalogue, generations } = this.#options
    const log = this.#options.log.child({ siteId })
    const receiver = new StreamReceiver({
      socket,
      log,
      ...(this.#options.allocate === undefined ? {} : { allocate: this.#options.allocate }),
      ...(this.#options.hashes === undefined ? {} : { hashes: this.#options.hashes }),
      admit: async (hello, admitted) => {
        await generations.load(siteId, hello.vpg)
        if (admitted.closed) throw new CdpError('CLOSED', 'the stream has ended already')
        this.#requireOwner(siteId, hello)
        const { store } = await registry.open(siteId, hello.vm)
        // It may have been handed over meanwhile.
        const generation = this.#requireOwner(siteId, hello)
        catalogue.noteVpg(siteId, hello.vpg, hello.vms)
        // From here to the answer nothing waits: of two streams that came at once, the later one finds the earlier one here.
        if (!admitted.closed) this.#takeOver(`${siteId}/${hello.vm}`, hello.epoch, admitted, store.epoch)
        return { store, generation }
      },
      // A plugin that was started again shows its RPO at once, and never labels a checkpoint below one that is here.
      onWelcomed: ({ hello }) => {
        const latest = hello && catalogue.latest(siteId, hello.vpg)
        if (latest !== undefined) receiver.tell({ validCheckpoint: { id: latest.id, atUnixMs: latest.atUnixMs } })
        if (hello !== undefined) this.#options.onConnected?.(siteId, hello.vm)
      },
      onClosed: (closed, why) => {
        this.#all.delete(closed)
        const { hello } = closed
        if (hello === undefined) return
        const key = `${siteId}/${hello.vm}`
        if (this.#streams.get(key) === closed) this.#streams.delete(key)
        log.info('stream ended', { vm: hello.vm, why })
      },
    })
    this.#all.set(receiver, siteId)
  }

  /**
   * The group belongs to somebody else from now on, durably: streams of older generations end, and none of them is admitted again.
   * @throws CdpError FORMAT, Node's error; nothing was changed then
   */
  async raiseGeneration(siteId: string, vpg: string, why: string): Promise<GroupGeneration> {
    const raised = await this.#options.generations.raise(siteId, vpg, why)
    for (const [receiver, site] of [...this.#all]) {
      const { hello } = receiver
      if (site !== siteId || hello?.vpg !== vpg) continue
      const error = generationError(vpg, hello.generation, raised.generation, why)
      if (error !== undefined) receiver.refuse(error)
    }
    return raised
  }

  /** The generation of the stream's group. @throws CdpError FENCED, GENERATION_AHEAD */
  #requireOwner(siteId: string, hello: Hello): number {
    const { generation, why } = this.#options.generations.known(siteId, hello.vpg)
    const error = generationError(hello.vpg, hello.generation, generation, why)
    if (error === undefined) return generation
    this.#options.onDisowned?.(siteId, hello, error)
    throw error
  }

  #takeOver(key: string, helloEpoch: number, admitted: StreamReceiver, storeEpoch: number): void {
    // The store refuses an epoch that is not its own; nobody has to make room for that.
    if (helloEpoch !== 0 && helloEpoch !== storeEpoch) return
    const older = this.#streams.get(key)
    // A reconnect may come before the death of its own old connection was noticed; only a newer attach makes the old one stale.
    if (helloEpoch === 0) older?.supersede()
    else if (older?.hello?.epoch === 0 && older.epoch === 0) return
    else older?.close('the same attach connected again')
    this.#streams.set(key, admitted)
  }

  isConnected(siteId: string, vm: string): boolean {
    return this.#streams.has(`${siteId}/${vm}`)
  }

  isSiteConnected(siteId: string): boolean {
    return [...this.#streams.keys()].some((key) => key.startsWith(`${siteId}/`))
  }

  /** Asks the protected site to compare this VM with what is here and to send what differs. False if it is not connected. */
  askForSync(siteId: string, vm: string, why: string): boolean {
    const stream = this.#streams.get(`${siteId}/${vm}`)
    if (stream === undefined || stream.epoch === 0) return false
    stream.tell({ syncWanted: { why } })
    return true
  }

  /** A checkpoint became valid: the protected site shows it as its RPO. */
  tellValid(siteId: string, vpg: string, validCheckpoint: { id: string; atUnixMs: number }): void {
    for (const [key, stream] of this.#streams) if (key.startsWith(`${siteId}/`) && stream.hello?.vpg === vpg) stream.tell({ validCheckpoint })
  }

  [Symbol.dispose](): void {
    for (const receiver of [...this.#all.keys()]) receiver[Symbol.dispose]()
  }
}
