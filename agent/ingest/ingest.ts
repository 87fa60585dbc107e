import type { Duplex } from 'node:stream'
import type { Logger } from '../../core/log/index.ts'
import type { Catalogue } from '../checkpoint/index.ts'
import { StreamReceiver } from './stream-receiver.ts'
import type { VmRegistry } from './vm-registry.ts'

export type IngestOptions = { registry: VmRegistry; catalogue: Catalogue; log: Logger; /** See StreamReceiverOptions. */ allocate?: (lengthBytes: number) => Buffer }

/** Takes streams over from the listener: one per VM at a time, the newest attach wins. */
export class Ingest implements Disposable {
  readonly #options: IngestOptions
  readonly #streams = new Map<string, StreamReceiver>()
  readonly #all = new Set<StreamReceiver>()

  constructor(options: IngestOptions) {
    this.#options = options
  }

  /** A verified connection of a paired site. */
  take(socket: Duplex, siteId: string): void {
    const { registry, catalogue } = this.#options
    const log = this.#options.log.child({ siteId })
    const receiver = new StreamReceiver({
      socket,
      log,
      ...(this.#options.allocate === undefined ? {} : { allocate: this.#options.allocate }),
      admit: async (hello, admitted) => {
        const { store } = await registry.open(siteId, hello.vm)
        catalogue.noteVpg(siteId, hello.vpg, hello.vms)
        // From here to the answer nothing waits: of two streams that came at once, the later one finds the earlier one here.
        if (!admitted.closed) this.#takeOver(`${siteId}/${hello.vm}`, hello.epoch, admitted, store.epoch)
        return store
      },
      // A plugin that was started again shows its RPO at once, and never labels a checkpoint below one that is here.
      onWelcomed: ({ hello }) => {
        const latest = hello && catalogue.latest(siteId, hello.vpg)
        if (latest !== undefined) receiver.tell({ validCheckpoint: { id: latest.id, atUnixMs: latest.atUnixMs } })
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
    this.#all.add(receiver)
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

  /** A checkpoint became valid: the protected site shows it as its RPO. */
  tellValid(siteId: string, vpg: string, validCheckpoint: { id: string; atUnixMs: number }): void {
    for (const [key, stream] of this.#streams) if (key.startsWith(`${siteId}/`) && stream.hello?.vpg === vpg) stream.tell({ validCheckpoint })
  }

  [Symbol.dispose](): void {
    for (const receiver of [...this.#all]) receiver[Symbol.dispose]()
  }
}
