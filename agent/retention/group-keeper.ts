import { setImmediate as nextTurn } from 'node:timers/promises'
import type { EventLog } from '../../core/api/index.ts'
import { CdpError, errorCode, errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { Catalogue, CatalogueEntry } from '../checkpoint/index.ts'
import { isFull } from '../journal/index.ts'
import type { PromotionProgress, VmStore } from '../journal/index.ts'
import type { PinInfo, PinRegistry } from '../recovery/index.ts'
import { AlarmBoard } from './alarms.ts'
import type { Alarm, RaisedAlarm } from './alarms.ts'
import { groupStatePath, loadGroupState, newGroupState, saveGroupState } from './group-state.ts'
import type { GroupSettings, GroupState, Target } from './group-state.ts'
import { isAtOrBefore, lived, movedTo, sampleEveryMs, spanMs } from './history-clock.ts'
import type { Candidate } from './history-clock.ts'
import { givesUpForSync, planRetention } from './plan.ts'
import type { Plan, VmFacts } from './plan.ts'
import type { RetentionPolicy } from './policy.ts'
import { Thinner } from './thinner.ts'

export type GroupKeeperOptions = {
  siteId: string
  vpg: string
  policy: RetentionPolicy
  /** Where the state of groups is kept. */
  directory: string
  catalogue: Catalogue
  storeOf: (vm: string) => VmStore | undefined
  pins: PinRegistry
  pace: (bytes: number, signal: AbortSignal) => Promise<void>
  monotonicMs: () => number
  nowUnixMs: () => number
  events: EventLog
  log: Logger
  /** Journal that one step of a promotion may read. */
  stepBytes: number
}

export type GroupProgress = PromotionProgress & { vm: string; target: Candidate }

/** Retention of one group: looks, plans, promotes one step, thins. One turn at a time. */
export class GroupKeeper {
  readonly #options: GroupKeeperOptions
  readonly #path: string
  readonly #board: AlarmBoard
  readonly #thinner: Thinner
  #state: GroupState = newGroupState()
  #newest: (Candidate & { seenMs: number }) | undefined
  #heldBy: Plan['heldBy']
  #progress: GroupProgress | undefined
  #running: Promise<void> = Promise.resolve()

  constructor(options: GroupKeeperOptions) {
    const { siteId, vpg, policy, directory, catalogue, events, nowUnixMs } = options
    this.#options = options
    this.#path = groupStatePath(directory, siteId, vpg)
    this.#board = new AlarmBoard(vpg, events, nowUnixMs)
    this.#thinner = new Thinner({ catalogue, siteId, vpg, levels: policy.thinning })
  }

  get siteId(): string {
    return this.#options.siteId
  }
  get vpg(): string {
    return this.#options.vpg
  }
  get policy(): RetentionPolicy {
    const { syncOverflow = this.#options.policy.syncOverflow } = this.#state.settings ?? {}
    return { ...this.#options.policy, syncOverflow }
  }
  get state(): Readonly<GroupState> {
    return this.#state
  }
  get heldBy(): Plan['heldBy'] {
    return this.#heldBy
  }
  get progress(): GroupProgress | undefined {
    return this.#progress
  }
  get alarms(): RaisedAlarm[] {
    return this.#board.list()
  }
  get isFilling(): boolean {
    return this.#state.filledMs < this.policy.historyMs && this.#state.shortenedBy === undefined
  }

  /** Reads the state. A promotion that was under way when the agent ended goes on with the next turn, and nothing below it is offered until then. */
  async load(): Promise<void> {
    try {
      this.#state = await loadGroupState(this.#path)
    } catch (error) {
      if (errorCode(error) !== 'FORMAT') throw error
      this.#options.log.error('the state of retention cannot be read; history is kept for longer', { vpg: this.vpg, error: errorMessage(error) })
    }
    const { intent, beforeSync } = this.#state
    // A catalogue made again has lost the name.
    if (beforeSync !== undefined) this.#options.catalogue.tag(this.siteId, this.vpg, beforeSync.id, beforeSync.tag)
    if (intent === undefined) return
    this.#options.pins.reserve(this.#directories(intent))
    // The next turn does it again, and says why if it cannot.
    await this.#forgetBelow(intent).catch(() => undefined)
  }

  /** What will not be recoverable is not offered any more before it is not. */
  async #forgetBelow({ seqs }: Candidate): Promise<void> {
    const floors = new Map(Object.entries(seqs))
    while (this.#options.catalogue.dropBelow(this.siteId, floors) > 0) await nextTurn()
  }

  /** @param vms members of the group @param reserveShareBytes what it should free for the file system's reserve */
  turn(vms: readonly string[], reserveShareBytes: number, signal: AbortSignal): Promise<void> {
    return this.#alone(() => this.#turn(vms, reserveShareBytes, signal))
  }

  /** What is chosen for this group from now on. @throws Node's error */
  set(settings: GroupSettings): Promise<void> {
    return this.#alone(async () => {
      const state = { ...this.#state, settings: { ...this.#state.settings, ...settings } }
      await saveGroupState(this.#path, state)
      this.#state = state
    })
  }

  /** What is known of places in the journal of a VM that goes holds no more. @throws Node's error */
  forgetVm(vm: string): Promise<void> {
    return this.#alone(async () => {
      const { oldest, intent, clock } = this.#state
      const samples = clock.samples.flatMap((sample) => without(sample, vm) ?? [])
      const state = { ...this.#state, oldest: oldest && without(oldest, vm), intent: intent && without(intent, vm), clock: { ...clock, samples } }
      this.#newest = this.#newest && without(this.#newest, vm)
      await saveGroupState(this.#path, state)
      this.#state = state
    })
  }

  /** The state changes in one place at a time. */
  #alone(work: () => Promise<void>): Promise<void> {
    const done = this.#running.then(work)
    this.#running = done.catch(() => undefined)
    return done
  }

  async #turn(vms: readonly string[], reserveShareBytes: number, signal: AbortSignal): Promise<void> {
    const trouble: Alarm[] = []
    try {
      await this.#look(vms)
      await this.#goOn(vms, signal)
      await this.#nameBeforeSync(vms)
      const kept = this.#keepBeforeSyncs(vms)
      const { target } = this.#plan(vms, reserveShareBytes)
      if (target !== undefined) await this.#promote(this.#step(target), signal)
      for (const vm of vms) if (this.#isOpen(vm)) await this.#store(vm).base.trim()
      await this.#thinner.turn(this.#state.clock, new Set([this.#state.oldest?.id ?? '', this.#state.intent?.id ?? '', ...kept]))
    } catch (error) {
      if (signal.aborted) return
      trouble.push(troubleOf(error))
    } finally {
      this.#progress = undefined
    }
    // As it is now, whatever became of the plan.
    const { heldBy, alarms } = this.#plan(vms, reserveShareBytes)
    this.#heldBy = heldBy
    const isDamage = trouble.some(({ id }) => id === 'retention.damaged') && alarms.some(({ id }) => id === 'retention.damaged')
    this.#board.show(isDamage ? alarms : [...alarms, ...trouble])
  }

  /** Notes what the newest checkpoint is, and how much history went by. */
  async #look(vms: readonly string[]): Promise<void> {
    const { catalogue, siteId, vpg, monotonicMs, policy } = this.#options
    const entry = catalogue.newestAtOrBelow(siteId, vpg, new Map(vms.map((vm) => [vm, Infinity])))
    if (entry === undefined || entry.id === this.#newest?.id) return
    const candidate = candidateOf(entry)
    const newest = { ...candidate, seenMs: monotonicMs() }
    // A newest one that became suspect: time has not gone back.
    if (this.#newest !== undefined && isAtOrBefore(newest, this.#newest)) return
    const sinceMs = this.#newest === undefined ? 0 : newest.seenMs - this.#newest.seenMs
    this.#newest = newest
    const { samples } = this.#state.clock
    this.#state = { ...this.#state, clock: lived(this.#state.clock, sinceMs, candidate, sampleEveryMs(policy.historyMs)) }
    if (spanMs(this.#state.clock) >= policy.historyMs) this.#state = { ...this.#state, filledMs: Math.max(this.#state.filledMs, policy.historyMs), shortenedBy: undefined }
    if (this.#state.clock.samples !== samples) await saveGroupState(this.#path, this.#state)
  }

  /** History is given up for a sync: the checkpoint that is kept gets a name first, so that everybody sees what is left. */
  async #nameBeforeSync(vms: readonly string[]): Promise<void> {
    const { catalogue, siteId, vpg, events } = this.#options
    if (this.policy.syncOverflow !== 'give-up' || !givesUpForSync({ policy: this.policy, vms: this.#facts(vms) })) return
    const newest = catalogue.newestAtOrBelow(siteId, vpg, new Map(vms.map((vm) => [vm, Infinity])))
    if (newest === undefined || newest.id === this.#state.beforeSync?.id) return
    const named = { id: newest.id, tag: 'the last one before a sync that did not fit' }
    catalogue.tag(siteId, vpg, named.id, named.tag)
    const state = { ...this.#state, beforeSync: named }
    await saveGroupState(this.#path, state)
    this.#state = state
    events.append({
      level: 'warn', kind: 'retention.gave-up', message: `VPG ${vpg}: a sync would not fit the limit of a journal: history is given up for it, as configured, down to checkpoint ${named.id} of ${new Date(newest.atUnixMs).toISOString()}`, context: { vpg, checkpointId: named.id },
    })
  }

  /**
   * What there was before a VM was changed behind our back gets a name, once that is certain. Everything about it comes from the journals, so a catalogue that is made
   * again names the same.
   * @returns ids that may get one yet
   */
  #keepBeforeSyncs(vms: readonly string[]): string[] {
    const { catalogue, siteId, vpg, events } = this.#options
    const undecided: string[] = []
    for (const { vm, seq, tag, changed } of vms.flatMap((one) => catalogue.beforeSyncs(siteId, one))) {
      const entry = catalogue.newestWith(siteId, vpg, vm, seq)
      if (entry === undefined) continue
      if (!changed) {
        undecided.push(entry.id)
        continue
      }
      catalogue.tag(siteId, vpg, entry.id, tag)
      catalogue.forgetBeforeSync(siteId, vm, seq)
      events.append({ level: 'info', kind: 'checkpoint.kept', message: `VPG ${vpg}: checkpoint ${entry.id} of ${new Date(entry.atUnixMs).toISOString()} is kept: ${tag}`, context: { vpg, vmId: Number(vm), checkpointId: entry.id } })
    }
    return undecided
  }

  /** Finishes what was begun: the group's own promotion, and one of a VM whose group forgot it. */
  async #goOn(vms: readonly string[], signal: AbortSignal): Promise<void> {
    if (this.#state.intent !== undefined) await this.#finish(this.#state.intent, signal)
    for (const vm of vms) {
      const toSeq = this.#options.storeOf(vm)?.base.promotingToSeq
      if (toSeq !== undefined) await this.#promoteVm(vm, toSeq, { id: '', atUnixMs: 0, seqs: { [vm]: toSeq } }, signal)
    }
  }

  #facts(vms: readonly string[]): VmFacts[] {
    const { catalogue, siteId, pins } = this.#options
    const allPins = pins.list()
    return vms.flatMap((vm) => {
      const store = this.#options.storeOf(vm)
      if (store === undefined || !store.baseComplete) return []
      const sinceSeq = catalogue.syncSinceSeq(siteId, vm)
      const mine: PinInfo[] = allPins.filter(({ vmDirectory }) => vmDirectory === store.directory)
      return [{ vm, baseSeq: store.baseSeq, journalBytes: store.journalBytes, seqThatFrees: (bytes: number) => store.base.seqThatFrees(bytes), pins: mine, syncBytes: sinceSeq === undefined ? 0 : store.base.bytesFrom(sinceSeq), damagedSeq: store.base.firstDamagedSeq, isDamaged: store.damageBook.spans().some(({ toSeq }) => toSeq === Number.MAX_SAFE_INTEGER) }]
    })
  }

  #plan(vms: readonly string[], reserveShareBytes: number): Plan {
    const { catalogue, siteId, vpg } = this.#options
    const facts = this.#facts(vms)
    return planRetention({
      policy: this.policy, clock: this.#state.clock, isFilling: this.isFilling, vms: facts, reserveShareBytes,
      find: {
        newestAtOrBelow: (limits) => optional(catalogue.newestAtOrBelow(siteId, vpg, limits)),
        oldestAtOrAbove: (vm, seq) => optional(catalogue.oldestAtOrAbove(siteId, vpg, vm, seq)),
      },
    })
  }

  /** A long way is gone in steps, so that a crash costs one step and space is freed on the way. */
  #step(target: Target): Target {
    const { catalogue, siteId, vpg, stepBytes } = this.#options
    const limits = new Map<string, number>()
    for (const [vm, seq] of Object.entries(target.seqs)) limits.set(vm, Math.min(seq, this.#options.storeOf(vm)?.base.seqWithin(stepBytes) ?? seq))
    if ([...limits].every(([vm, seq]) => seq === target.seqs[vm])) return target
    const near = optional(catalogue.newestAtOrBelow(siteId, vpg, limits))
    if (near !== undefined && this.#moves(near)) return { ...near, why: target.why }
    for (const vm of limits.keys()) {
      const next = optional(catalogue.oldestAtOrAbove(siteId, vpg, vm, (this.#options.storeOf(vm)?.baseSeq ?? 0) + 1))
      if (next !== undefined && this.#moves(next) && isAtOrBefore(next, target)) return { ...next, why: target.why }
    }
    return target
  }

  #moves({ seqs }: Candidate): boolean {
    return Object.entries(seqs).some(([vm, seq]) => seq > (this.#options.storeOf(vm)?.baseSeq ?? Infinity))
  }

  async #promote(target: Target, signal: AbortSignal): Promise<void> {
    const { pins } = this.#options
    // All that is needed is read before anything is given up.
    for (const [vm, seq] of Object.entries(target.seqs)) await this.#store(vm).base.check(seq, { pace: this.#options.pace, signal })
    const directories = this.#directories(target)
    // One turn with the check: whoever pins first is seen here, whoever comes later is refused.
    if (pins.reserve(directories).length > 0) return
    try {
      await saveGroupState(this.#path, { ...this.#state, intent: target })
    } catch (error) {
      for (const vm of Object.keys(target.seqs)) {
        const store = this.#options.storeOf(vm)
        if (store !== undefined) pins.withdraw(store.directory, store.base.recoverableFromSeq)
      }
      throw error
    }
    this.#state = { ...this.#state, intent: target }
    await this.#finish(target, signal)
  }

  /** The steps behind the intent; each may have been done already. */
  async #finish(intent: Target, signal: AbortSignal): Promise<void> {
    const { siteId, log } = this.#options
    await this.#forgetBelow(intent)
    for (const [vm, seq] of Object.entries(intent.seqs)) {
      const { base } = this.#store(vm)
      await this.#promoteVm(vm, Math.max(seq, base.promotingToSeq ?? 0), intent, signal)
      await base.trim()
    }
    const state: GroupState = {
      ...this.#state, oldest: intent, intent: undefined, clock: movedTo(this.#state.clock, intent),
      ...(intent.why === 'time' ? {} : { shortenedBy: intent.why }),
    }
    await saveGroupState(this.#path, state)
    this.#state = state
    log.info('the oldest checkpoint of a group moved', { siteId, vpg: this.vpg, checkpointId: intent.id, why: intent.why })
  }

  async #promoteVm(vm: string, seq: number, target: Candidate, signal: AbortSignal): Promise<void> {
    await this.#store(vm).base.promote(seq, { pace: this.#options.pace, signal, onProgress: (progress) => (this.#progress = { ...progress, vm, target }) })
  }

  #directories({ seqs }: Candidate): Map<string, number> {
    const directories = new Map<string, number>()
    for (const [vm, seq] of Object.entries(seqs)) {
      const store = this.#options.storeOf(vm)
      if (store !== undefined) directories.set(store.directory, seq)
    }
    return directories
  }

  /** A full store is open: promotion is what makes room for it. */
  #isOpen(vm: string): boolean {
    const condition = this.#options.storeOf(vm)?.condition
    return condition === 'open' || condition === 'full'
  }

  /** @throws CdpError CONFLICT */
  #store(vm: string): VmStore {
    const store = this.#options.storeOf(vm)
    if (store === undefined || !this.#isOpen(vm)) {
      throw new CdpError('CONFLICT', `the journal of VM ${vm} is not open`, { retry: true, hint: 'See the log of the agent for why; its group stays where it is until then.' })
    }
    return store
  }
}

const candidateOf = ({ id, atUnixMs, namedSeqs }: CatalogueEntry): Candidate => ({ id, atUnixMs, seqs: namedSeqs })
/** As far as it speaks of other VMs; undefined if it speaks of none. */
const without = <T extends Candidate>(candidate: T, vm: string): T | undefined => {
  const seqs = Object.fromEntries(Object.entries(candidate.seqs).filter(([one]) => one !== vm))
  return Object.keys(seqs).length === 0 ? undefined : { ...candidate, seqs }
}
const optional = (entry: CatalogueEntry | undefined): Candidate | undefined => entry && candidateOf(entry)

const troubleOf = (error: unknown): Alarm => {
  if (errorCode(error) === 'JOURNAL_DAMAGED') return { id: 'retention.damaged', level: 'error', message: `history cannot be promoted: ${errorMessage(error)}` }
  if (isFull(error)) {
    return { id: 'retention.no-room', level: 'error', message: `no room to promote history (${errorMessage(error)}); everything stays readable, and it goes on by itself when there is room` }
  }
  return { id: 'retention.failed', level: 'error', message: `history cannot be promoted: ${errorMessage(error)}; it is tried again` }
}
