import { setTimeout as delay } from 'node:timers/promises'
import type { EventLog } from '../../core/api/index.ts'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { Catalogue } from '../checkpoint/index.ts'
import type { Damage, MirrorDamage, VmStore } from '../journal/index.ts'
import { damageText, mirrorText, whereText } from './damage-text.ts'
import { Judge } from './judge.ts'
import { isDue, readScrubRecord, writeScrubRecord } from './scrub-record.ts'
import type { Pass, ScrubRecord } from './scrub-record.ts'
import { judgeDamage, scrubMirror, scrubSegment, scrubSuspects } from './vm-scrub.ts'
import type { Found } from './vm-scrub.ts'

type Vm = { siteId: string; vm: string; store: VmStore }
export type ScrubKeeperOptions = {
  vms: () => Vm[]
  catalogue: Catalogue
  events: EventLog
  log: Logger
  /** From the beginning of a pass over a VM to the next; 0: only when asked for. */
  everyMs: number
  rateBytesPerSec: number
  nowUnixMs: () => number
  monotonicMs?: () => number
  /** Asks the protected site to compare everything with what is here, and to send what differs. False if it is not connected. */
  askForSync: (siteId: string, vm: string, why: string) => boolean
  /** How often it looks whether something is to be done. */
  lookEveryMs?: number
}

/** How the scrub of one VM stands. */
export type ScrubbedVm = Vm & { record: ScrubRecord; totalBytes: number; isHopeless: boolean }

type Watched = { record: ScrubRecord | undefined; store: VmStore; wanted: boolean; judgedSeq: number; askedMs: number | undefined; hopeless: boolean; isNoted: boolean }

const LOOK_EVERY_MS = 30_000
/** A promotion waits for one step at most. */
const MIRROR_STEP_BYTES = 4 * 1024 * 1024
const MIRROR_KEEP_BYTES = 256 * 1024 * 1024
const ASK_AGAIN_MS = 3_600_000

/**
 * Passes over all VMs, which take turns, one segment or a few MiB of a mirror at a time. What it finds is first in the VM's damage book, which at once keeps promotion
 * from it, then in its file and in the catalogue; what of that a full disk refuses is tried again with every look.
 */
export class ScrubKeeper implements AsyncDisposable {
  readonly #options: ScrubKeeperOptions
  readonly #watched = new Map<string, Watched>()
  readonly #ending = new AbortController()
  #timer: NodeJS.Timeout | undefined
  #round: Promise<void> | undefined

  constructor(options: ScrubKeeperOptions) {
    this.#options = options
  }

  get everyMs(): number {
    return this.#options.everyMs
  }
  get rateBytesPerSec(): number {
    return this.#options.rateBytesPerSec
  }

  start(): void {
    this.#timer = setTimeout(() => void this.round().finally(() => {
      if (!this.#ending.signal.aborted) this.start()
    }), this.#options.lookEveryMs ?? LOOK_EVERY_MS).unref()
  }

  /** Begins a pass over these VMs, or goes on with the one that is under way; the next round does it. */
  async want(vms: readonly Vm[]): Promise<void> {
    for (const vm of vms) (await this.#watch(vm)).wanted = true
    void this.round()
  }

  async list(): Promise<ScrubbedVm[]> {
    const all: ScrubbedVm[] = []
    for (const vm of this.#options.vms()) {
      const { record, hopeless } = await this.#watch(vm)
      all.push({ ...vm, record: record ?? { format: 1 }, totalBytes: vm.store.journalBytes, isHopeless: hopeless })
    }
    return all
  }

  /** A stream of this VM begins: what is damaged is asked for at once. */
  connected(siteId: string, vm: string): void {
    const watched = this.#watched.get(`${siteId}/${vm}`)
    if (watched !== undefined) watched.askedMs = undefined
    if (watched !== undefined && watched.store.damageBook.spans().length > 0) void this.round()
  }

  /** Looks after every VM, and does the passes that are due, to their ends. A call while one runs waits for that one. */
  async round(): Promise<void> {
    this.#round ??= this.#runRound().finally(() => (this.#round = undefined))
    await this.#round
  }

  async [Symbol.asyncDispose](): Promise<void> {
    clearTimeout(this.#timer)
    this.#ending.abort(new CdpError('ABORTED', 'the agent stops'))
    await this.#round
  }

  async #runRound(): Promise<void> {
    for (let more = true; more; ) {
      more = false
      for (const vm of this.#options.vms()) {
        if (this.#ending.signal.aborted) return
        try {
          more = (await this.#turn(vm)) || more
        } catch (error) {
          if (!this.#ending.signal.aborted) this.#options.log.warn('the scrub of a VM is interrupted; it goes on later', { siteId: vm.siteId, vm: vm.vm, error: errorMessage(error) })
        }
      }
    }
  }

  async #watch(vm: Vm): Promise<Watched> {
    const key = `${vm.siteId}/${vm.vm}`
    const known = this.#watched.get(key)
    if (known?.store === vm.store) return known
    const record = await readScrubRecord(vm.store.directory)
    const watched: Watched = { record, store: vm.store, wanted: known?.wanted ?? false, judgedSeq: 0, askedMs: undefined, hopeless: false, isNoted: false }
    this.#watched.set(key, watched)
    return watched
  }

  /** Settles what is known, and reads one segment more of a pass. @returns true if the pass goes on */
  async #turn(vm: Vm): Promise<boolean> {
    const watched = await this.#watch(vm)
    const suspects = await scrubSuspects(vm.store, this.#options.nowUnixMs())
    await this.#settle(vm, watched, suspects)
    const { condition, baseComplete } = vm.store
    if (!baseComplete || (condition !== 'open' && condition !== 'full')) return false
    const pass = watched.record?.pass ?? (watched.wanted || isDue(watched.record ?? { format: 1 }, this.#options.everyMs, this.#options.nowUnixMs()) ? this.#newPass(vm.store) : undefined)
    if (pass === undefined) return false
    watched.wanted = false
    return this.#step(vm, watched, pass)
  }

  #newPass({ segments }: VmStore): Pass {
    return { startedAtUnixMs: this.#options.nowUnixMs(), nextSegment: segments.at(0)?.segmentNumber ?? 0, lastSegment: segments.at(-1)?.segmentNumber ?? -1, mirror: { disk: 0, offsetBytes: 0 }, readBytes: 0, damagedFound: 0 }
  }

  async #step(vm: Vm, watched: Watched, pass: Pass): Promise<boolean> {
    const { store } = vm
    const info = store.segments.find(({ segmentNumber }) => segmentNumber >= pass.nextSegment && segmentNumber <= pass.lastSegment)
    if (info === undefined) return this.#mirrorStep(vm, watched, pass)
    const found = await this.#unlessEnding(scrubSegment(store, info, this.#options.rateBytesPerSec, this.#options.nowUnixMs()))
    const next = { ...pass, nextSegment: info.segmentNumber + 1, readBytes: pass.readBytes + (found?.readBytes ?? 0), damagedFound: pass.damagedFound + (found?.damage.length ?? 0) }
    if (found !== undefined) await this.#settle(vm, watched, found)
    await this.#keep(vm, watched, { ...watched.record, format: 1, pass: next })
    return true
  }

  /** Behind the segments come the mirrors, in order of the numbers of their disks. */
  async #mirrorStep(vm: Vm, watched: Watched, pass: Pass): Promise<boolean> {
    const { store } = vm
    const disk = store.disks.map((one) => one.disk).sort((a, b) => a - b).find((number) => number >= pass.mirror.disk)
    if (disk === undefined) {
      await this.#end(vm, watched, pass)
      return false
    }
    const { rateBytesPerSec, nowUnixMs } = this.#options
    const found = await this.#unlessEnding(scrubMirror(store, { disk, offsetBytes: disk === pass.mirror.disk ? pass.mirror.offsetBytes : 0 }, MIRROR_STEP_BYTES, nowUnixMs(), this.#ending.signal))
    // A promotion is half done: it is finished first.
    if (found === undefined) return false
    await this.#settle(vm, watched, found)
    const mirror = found.nextBytes === undefined ? { disk: disk + 1, offsetBytes: 0 } : { disk, offsetBytes: found.nextBytes }
    const next = { ...pass, mirror, readBytes: pass.readBytes + found.readBytes, damagedFound: pass.damagedFound + (found.mirror?.length ?? 0) }
    watched.record = { ...watched.record, format: 1, pass: next }
    // Steps are short: after a crash some of them are done again.
    if (found.nextBytes === undefined || Math.floor(found.nextBytes / MIRROR_KEEP_BYTES) !== Math.floor((found.nextBytes - MIRROR_STEP_BYTES) / MIRROR_KEEP_BYTES)) await this.#keep(vm, watched, watched.record)
    await delay((found.readBytes / rateBytesPerSec) * 1000, undefined, { signal: this.#ending.signal })
    return true
  }

  async #end({ siteId, vm, store }: Vm, watched: Watched, { startedAtUnixMs, readBytes, damagedFound }: Pass): Promise<void> {
    const endedAtUnixMs = this.#options.nowUnixMs()
    await this.#keep({ siteId, vm, store }, watched, { format: 1, last: { startedAtUnixMs, endedAtUnixMs, readBytes, damagedFound } })
    this.#options.log.info('the scrub of a VM has come to its end', { siteId, vm, readBytes, damagedFound })
  }

  async #keep({ siteId, vm, store }: Vm, watched: Watched, record: ScrubRecord): Promise<void> {
    watched.record = record
    // Without it a pass goes on further back after a restart.
    await writeScrubRecord(store.directory, record).catch((error: unknown) => this.#options.log.warn('the position of a scrub could not be kept', { siteId, vm, error: errorMessage(error) }))
  }

  /** What was found becomes durable, is shown, and is asked for; what healed meanwhile is told. */
  async #settle(vm: Vm, watched: Watched, found: Found): Promise<void> {
    const { siteId, store } = vm
    const { catalogue } = this.#options
    for (const what of found.mended) this.#tell(vm, 'warn', 'scrub.index-damaged', `${what}; it is made again from the records, which are whole`)
    const isOpen = store.damageBook.spans().some(({ toSeq }) => toSeq === Number.MAX_SAFE_INTEGER)
    const newestSeq = isOpen ? (catalogue.namedSeqs(siteId, vm.vm, watched.judgedSeq).at(-1) ?? 0) : 0
    const mirror = found.mirror ?? []
    if (isOpen && (found.damage.length > 0 || mirror.length > 0 || newestSeq > watched.judgedSeq)) {
      const { needed, hopeless, healed } = await judgeDamage(store, catalogue.namedSeqs(siteId, vm.vm, 0))
      watched.judgedSeq = newestSeq
      watched.hopeless = hopeless.length > 0
      watched.isNoted = false
      await this.#note(vm, watched)
      if (found.damage.length > 0) await this.#tellDamage(vm, found.damage)
      for (const one of mirror) this.#tellMirror(vm, one)
      const old = healed.filter((one) => !found.damage.includes(one as Damage) && !mirror.includes(one as MirrorDamage))
      if (old.length > 0) this.#tell(vm, 'info', 'scrub.healed', `what was damaged was written again: checkpoints from now on are whole (${old.length} damaged ranges)`)
      if (needed.length > 0) this.#ask(vm, watched, needed)
    } else await this.#note(vm, watched)
  }

  async #note({ siteId, vm, store }: Vm, watched: Watched): Promise<void> {
    const { catalogue, log } = this.#options
    try {
      if (store.damageBook.isSaved && watched.isNoted) return
      catalogue.noteDamage(siteId, vm, store.damageBook.spans())
      watched.isNoted = true
      await store.damageBook.save()
    } catch (error) {
      watched.isNoted = false
      log.error('what is damaged could not be kept; it holds as long as the agent runs, and is tried again', { siteId, vm, error: errorMessage(error) })
    }
  }

  #ask({ siteId, vm }: Vm, watched: Watched, needed: readonly (Damage | MirrorDamage)[]): void {
    const nowMs = (this.#options.monotonicMs ?? (() => performance.now()))()
    if (watched.askedMs !== undefined && nowMs - watched.askedMs < ASK_AGAIN_MS) return
    if (this.#options.askForSync(siteId, vm, `its copy is damaged (${needed.length === 1 ? '1 range' : `${needed.length} ranges`})`)) watched.askedMs = nowMs
  }

  async #tellDamage(vm: Vm, damage: readonly Damage[]): Promise<void> {
    const { siteId, store } = vm
    await using judge = new Judge(store)
    const affected = this.#options.catalogue.damaged(siteId, vm.vm)
    for (const one of damage) {
      const where = whereText(await judge.extentsOf(one), store.disks)
      this.#tell(vm, 'error', 'scrub.damage', damageText(one, where, affected), { firstSeq: one.firstSeq, lastSeq: one.lastSeq, checkpoints: affected?.count ?? 0 })
    }
  }

  #tellMirror(vm: Vm, damage: MirrorDamage): void {
    const affected = this.#options.catalogue.damaged(vm.siteId, vm.vm)
    this.#tell(vm, 'error', 'scrub.damage', mirrorText(damage, vm.store.disks, affected), { disk: damage.disk, offsetBytes: damage.offsetBytes, lengthBytes: damage.lengthBytes, checkpoints: affected?.count ?? 0 })
  }

  #tell({ siteId, vm }: Vm, level: 'info' | 'warn' | 'error', kind: string, message: string, context: Record<string, number> = {}): void {
    this.#options.events.append({ level, kind, message: `VM ${vm}: ${message}`, context: { siteId, vm, ...context } })
    this.#options.log[level](message, { siteId, vm, ...context })
  }

  /** A segment that is just being read at a low rate is not waited for. @throws CdpError ABORTED when the agent stops */
  #unlessEnding<T>(work: Promise<T>): Promise<T> {
    const { signal } = this.#ending
    work.catch(() => undefined)
    return new Promise((resolve, reject) => {
      const give = (): void => reject(signal.reason as CdpError)
      if (signal.aborted) return give()
      signal.addEventListener('abort', give, { once: true })
      work.then(resolve, reject).finally(() => signal.removeEventListener('abort', give))
    })
  }
}

