import { mkdir, readdir, rename, rm } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { Catalogue } from '../checkpoint/index.ts'
import type { MirrorStorage } from '../mirror/index.ts'
import { syncDirectory, VmStore } from '../journal/index.ts'
import type { JournalMark, SegmentSealer, VmStoreOptions } from '../journal/index.ts'

export type VmRegistryOptions = {
  /** <directory>/<site id>/<vm>/ holds one VM. */
  directory: string
  catalogue: Catalogue
  sealer: SegmentSealer
  /** Where the mirrors of a VM are. Default: sparse files. */
  mirrorsOf?: (vmDirectory: string, log: Logger) => MirrorStorage
  clock: VmStoreOptions['clock']
  limits?: VmStoreOptions['limits']
  recycle?: VmStoreOptions['recycle']
  log: Logger
  /** A checkpoint became valid. */
  onValid: (siteId: string, vpg: string, checkpoint: { id: string; atUnixMs: number }) => void
  onSealed?: (siteId: string, vm: string) => void
  /** A segment went into the mirror and its file is gone. */
  onRemoved?: (path: string) => Promise<void>
  /** A replica is about to be deleted, and its store is closed: whoever remembers something of it forgets that. */
  onDeleting?: (siteId: string, vm: string, vmDirectory: string) => Promise<void>
  /** See VmStoreOptions. */
  mayGrow?: (siteId: string, vm: string, journalBytes: number) => CdpError | undefined
}

export type RegisteredVm = { siteId: string; vm: string; store: VmStore }

/** Beside the sites: stores that are being deleted. */
const REMOVED = '.removed'

/** The stores of all VMs of this agent; each journal's marks go into the catalogue before they are acknowledged. */
export class VmRegistry implements AsyncDisposable {
  readonly #options: VmRegistryOptions
  readonly #vms = new Map<string, RegisteredVm>()
  readonly #removing = new Set<string>()
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
    await this.#finishRemovals()
    for (const siteId of (await readdir(directory)).filter((name) => name !== REMOVED)) {
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
    if (this.#removing.has(key)) throw new CdpError('CONFLICT', `the replica of VM ${vm} is being deleted`, { retry: true })
    const known = this.#vms.get(key)
    if (known !== undefined && known.store.condition !== 'failed' && known.store.condition !== 'closed') return known
    const opening = this.#opening.get(key) ?? this.#open(siteId, vm, key).finally(() => this.#opening.delete(key))
    this.#opening.set(key, opening)
    return opening
  }

  /**
   * Deletes a store, with the checkpoints that need it. `mayGo` is asked once nobody can open it any more, and throws if it must stay.
   * First the directory gets another name: from then on it is deleted, whatever ends the agent.
   */
  async remove(siteId: string, vm: string, mayGo: (found: RegisteredVm) => void): Promise<void> {
    const { directory } = this.#options
    const key = `${siteId}/${vm}`
    const found = this.#vms.get(key)
    if (found === undefined || this.#removing.has(key)) throw new CdpError('NOT_FOUND', `there is no replica of VM ${vm} of site ${siteId} here`)
    this.#removing.add(key)
    try {
      mayGo(found)
      this.#vms.delete(key)
      await found.store[Symbol.asyncDispose]()
      await this.#options.onDeleting?.(siteId, vm, found.store.directory)
      const gone = join(directory, REMOVED, siteId, vm)
      await rm(gone, { recursive: true, force: true })
      await mkdir(dirname(gone), { recursive: true, mode: 0o700 })
      await rename(found.store.directory, gone)
      for (const changed of [dirname(found.store.directory), dirname(gone)]) await syncDirectory(changed)
      await this.#finishRemoval(siteId, vm)
    } finally {
      this.#removing.delete(key)
    }
  }

  async #finishRemovals(): Promise<void> {
    const { directory, log } = this.#options
    for (const siteId of await readdir(join(directory, REMOVED)).catch(() => [])) {
      for (const vm of await readdir(join(directory, REMOVED, siteId)).catch(() => [])) {
        await this.#finishRemoval(siteId, vm).catch((error: unknown) => log.error('a deleted replica is still there', { siteId, vm, error: errorMessage(error) }))
      }
    }
  }

  async #finishRemoval(siteId: string, vm: string): Promise<void> {
    const { directory, catalogue } = this.#options
    // Before the last trace goes: a journal that begins anew must not be measured by the one that was here.
    while (catalogue.dropBelow(siteId, new Map([[vm, Number.MAX_SAFE_INTEGER]])) > 0) await nextTurn()
    catalogue.forgetVm(siteId, vm)
    await rm(join(directory, REMOVED, siteId, vm), { recursive: true, force: true })
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.allSettled(this.#opening.values())
    await Promise.all([...this.#vms.values()].map(({ store }) => store[Symbol.asyncDispose]()))
    this.#vms.clear()
  }

  async #open(siteId: string, vm: string, key: string): Promise<RegisteredVm> {
    const { directory, catalogue, sealer, mirrorsOf, clock, limits, recycle, mayGrow, log } = this.#options
    // Until another one is open it stays in the list: it is closed then, and what it holds can be read.
    await this.#vms.get(key)?.store[Symbol.asyncDispose]().catch((error: unknown) => log.warn('a failed store did not close cleanly', { siteId, vm, error: errorMessage(error) }))
    // The journal itself is asked again, from the last one that the catalogue took.
    this.#unnoted.delete(key)
    const path = join(directory, siteId, vm)
    await mkdir(path, { recursive: true, mode: 0o700 })
    const vmLog = log.child({ siteId, vm })
    const store = await VmStore.open({ directory: path, vm, log: vmLog, clock, sealer, ...(mirrorsOf === undefined ? {} : { mirrors: mirrorsOf(path, vmLog) }), ...(recycle === undefined ? {} : { recycle }), ...(limits === undefined ? {} : { limits }), ...(mayGrow === undefined ? {} : { mayGrow: (bytes: number) => mayGrow(siteId, vm, bytes) }) })
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
      this.#noteDamage(registered)
      await this.#forgetBelow(registered)
    } catch (error) {
      await store[Symbol.asyncDispose]()
      throw error
    }
    store.onRecords = (marks) => this.#note(siteId, vm, marks, store.base.recoverableFromSeq)
    store.onRemoved = this.#options.onRemoved
    store.onSealed = () => this.#options.onSealed?.(siteId, vm)
    this.#vms.set(key, registered)
    return registered
  }

  /** The catalogue is less durable than the base, and may be an older one: what has left the history is not offered again. */
  async #forgetBelow({ siteId, vm, store }: RegisteredVm): Promise<void> {
    const { catalogue, log } = this.#options
    const floors = new Map([[vm, store.base.recoverableFromSeq]])
    try {
      while (catalogue.dropBelow(siteId, floors) > 0) await nextTurn()
    } catch (error) {
      // A full disk must not keep the journal from being read; a point that is offered too much is refused when it is opened.
      log.warn('the catalogue could not forget what has left the history', { siteId, vm, error: errorMessage(error) })
    }
  }

  /** A catalogue made again knows nothing of it. What it does not take now, the scrub brings again. */
  #noteDamage({ siteId, vm, store }: RegisteredVm): void {
    const { catalogue, log } = this.#options
    try {
      catalogue.noteDamage(siteId, vm, store.damageBook.spans())
    } catch (error) {
      log.warn('the catalogue did not take what is damaged', { siteId, vm, error: errorMessage(error) })
    }
  }

  async #catchUp({ siteId, vm, store }: RegisteredVm): Promise<void> {
    let marks: JournalMark[] = []
    for await (const mark of store.marks(this.#options.catalogue.seenSeq(siteId, vm) + 1)) {
      marks.push(mark)
      if (marks.length < 1000) continue
      this.#note(siteId, vm, marks, store.base.recoverableFromSeq)
      marks = []
    }
    this.#note(siteId, vm, marks, store.base.recoverableFromSeq)
  }

  /** Markers that name what has left the history say nothing: a catalogue made again holds what can be recovered, and no more. */
  #note(siteId: string, vm: string, fresh: readonly JournalMark[], recoverableFromSeq: number): void {
    const { catalogue, onValid } = this.#options
    const key = `${siteId}/${vm}`
    const marks = [...(this.#unnoted.get(key) ?? []), ...fresh]
    if (marks.length === 0) return
    this.#unnoted.set(key, marks)
    const valid: { vpg: string; id: string; atUnixMs: number }[] = []
    catalogue.batch(() => {
      for (const mark of marks) {
        if (mark.is === 'checkpoint') {
          if (mark.namedSeq < recoverableFromSeq) continue
          if (catalogue.noteMark(siteId, vm, mark.epoch, mark.namedSeq, mark.mark)) valid.push({ vpg: mark.mark.vpg, id: mark.mark.id, atUnixMs: mark.mark.atUnixMs })
        } else if (mark.is === 'proof') {
          catalogue.noteProof(siteId, vm, mark.epoch, mark.upToSeq, mark.mark.ok, mark.mark.fromSeq)
        } else if (mark.is === 'syncBegin') {
          catalogue.noteSyncBegin(siteId, vm, mark.seq, mark.mark.before)
        } else if (mark.is === 'syncEnd') {
          catalogue.noteSyncEnd(siteId, vm, mark.mark.sentBytes !== 0)
        }
      }
      catalogue.noteSeen(siteId, vm, marks[marks.length - 1].seq)
    })
    this.#unnoted.delete(key)
    for (const { vpg, id, atUnixMs } of valid) onValid(siteId, vpg, { id, atUnixMs })
  }
}
