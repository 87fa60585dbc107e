import { mkdir, readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { Catalogue } from '../checkpoint/index.ts'
import { VmStore } from '../journal/index.ts'
import type { JournalMark, SegmentSealer, VmStoreOptions } from '../journal/index.ts'

export type VmRegistryOptions = {
  /** <directory>/<site id>/<vm>/ holds one VM. */
  directory: string
  catalogue: Catalogue
  sealer: SegmentSealer
  clock: VmStoreOptions['clock']
  limits?: VmStoreOptions['limits']
  recycle?: VmStoreOptions['recycle']
  log: Logger
  /** A checkpoint became valid. */
  onValid: (siteId: string, vpg: string, checkpoint: { id: string; atUnixMs: number }) => void
  onSealed?: (siteId: string, vm: string) => void
}

export type RegisteredVm = { siteId: string; vm: string; store: VmStore }

/** The stores of all VMs of this agent; each journal's marks go into the catalogue before they are acknowledged. */
export class VmRegistry implements AsyncDisposable {
  readonly #options: VmRegistryOptions
  readonly #vms = new Map<string, RegisteredVm>()
  readonly #opening = new Map<string, Promise<RegisteredVm>>()
  /** Marks that the catalogue did not take, by VM: noted before any later one, else the catalogue would never look for them again. */
  readonly #unnoted = new Map<string, readonly JournalMark[]>()

  constructor(options: VmRegistryOptions) {
    this.#options = options
  }

  /** Opens everything that is there, and brings the catalogue up to date with the journals. A store that cannot be opened is left out, loudly. */
  async openAll(): Promise<void> {
    const { directory, log } = this.#options
    await mkdir(directory, { recursive: true })
    for (const siteId of await readdir(directory)) {
      for (const vm of await readdir(join(directory, siteId)).catch(() => [])) {
        await this.open(siteId, vm).catch((error: unknown) => log.error('the store of a VM cannot be opened', { siteId, vm, error: errorMessage(error) }))
      }
    }
  }

  list(): RegisteredVm[] {
    return [...this.#vms.values()]
  }

  get(siteId: string, vm: string): RegisteredVm | undefined {
    return this.#vms.get(`${siteId}/${vm}`)
  }

  /** The store of a VM; made if there is none. A store that has failed is opened again, which scans it. */
  async open(siteId: string, vm: string): Promise<RegisteredVm> {
    const key = `${siteId}/${vm}`
    const known = this.#vms.get(key)
    if (known !== undefined && known.store.condition !== 'failed' && known.store.condition !== 'closed') return known
    const opening = this.#opening.get(key) ?? this.#open(siteId, vm, key).finally(() => this.#opening.delete(key))
    this.#opening.set(key, opening)
    return opening
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.allSettled(this.#opening.values())
    await Promise.all([...this.#vms.values()].map(({ store }) => store[Symbol.asyncDispose]()))
    this.#vms.clear()
  }

  async #open(siteId: string, vm: string, key: string): Promise<RegisteredVm> {
    const { directory, catalogue, sealer, clock, limits, recycle, log } = this.#options
    const old = this.#vms.get(key)
    if (old !== undefined) {
      this.#vms.delete(key)
      await old.store[Symbol.asyncDispose]().catch((error: unknown) => log.warn('a failed store did not close cleanly', { siteId, vm, error: errorMessage(error) }))
    }
    // The journal itself is asked again, from the last one that the catalogue took.
    this.#unnoted.delete(key)
    const path = join(directory, siteId, vm)
    await mkdir(path, { recursive: true, mode: 0o700 })
    const store = await VmStore.open({ directory: path, vm, log: log.child({ siteId, vm }), clock, sealer, ...(recycle === undefined ? {} : { recycle }), ...(limits === undefined ? {} : { limits }) })
    const registered = { siteId, vm, store }
    try {
      // The journal may hold less than the catalogue once saw only if its disk lost acknowledged data.
      const seenSeq = catalogue.seenSeq(siteId, vm)
      if (seenSeq > store.durableSeq) {
        throw new CdpError('JOURNAL_DAMAGED', `the journal of VM ${vm} ends at ${store.durableSeq}, but ${seenSeq} was acknowledged`, {
          hint: 'The storage below the journal lost data. Remove the catalogue to rebuild it from what is there, then look at the storage.', context: { siteId, vm },
        })
      }
      await this.#catchUp(registered)
    } catch (error) {
      await store[Symbol.asyncDispose]()
      throw error
    }
    store.onRecords = (marks) => this.#note(siteId, vm, marks)
    store.onSealed = () => this.#options.onSealed?.(siteId, vm)
    this.#vms.set(key, registered)
    return registered
  }

  async #catchUp({ siteId, vm, store }: RegisteredVm): Promise<void> {
    let marks: JournalMark[] = []
    for await (const mark of store.marks(this.#options.catalogue.seenSeq(siteId, vm) + 1)) {
      marks.push(mark)
      if (marks.length < 1000) continue
      this.#note(siteId, vm, marks)
      marks = []
    }
    this.#note(siteId, vm, marks)
  }

  #note(siteId: string, vm: string, fresh: readonly JournalMark[]): void {
    if (fresh.length === 0) return
    const { catalogue, onValid } = this.#options
    const key = `${siteId}/${vm}`
    const marks = [...(this.#unnoted.get(key) ?? []), ...fresh]
    this.#unnoted.set(key, marks)
    const valid: { vpg: string; id: string; atUnixMs: number }[] = []
    catalogue.batch(() => {
      for (const mark of marks) {
        if (mark.is === 'checkpoint') {
          if (catalogue.noteMark(siteId, vm, mark.epoch, mark.namedSeq, mark.mark)) valid.push({ vpg: mark.mark.vpg, id: mark.mark.id, atUnixMs: mark.mark.atUnixMs })
        } else if (mark.is === 'proof') {
          catalogue.noteProof(siteId, vm, mark.epoch, mark.upToSeq, mark.mark.ok)
        }
      }
      catalogue.noteSeen(siteId, vm, marks[marks.length - 1].seq)
    })
    this.#unnoted.delete(key)
    for (const { vpg, id, atUnixMs } of valid) onValid(siteId, vpg, { id, atUnixMs })
  }
}
