import { randomBytes } from 'node:crypto'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { CheckpointKind, CheckpointMark } from '../../core/record/index.ts'
import type { StateNews } from '../../core/stream/index.ts'
import { GroupClock } from '../capture/index.ts'
import type { CaptureWorker, Disowned } from '../capture/index.ts'
import { CheckpointLabels, LocalPart, cutOnOneNode, cutOverNodes, scheduleCheckpoints } from '../checkpoint/index.ts'
import type { CutOutcome, CutParticipant, LocalMembers } from '../checkpoint/index.ts'
import type { Priority } from './bandwidth-keeper.ts'
import { GroupFence } from './group-fence.ts'
import type { Fence } from './group-fence.ts'
import { MemberWatch } from './member-watch.ts'
import { ProtectedVm } from './protected-vm.ts'
import type { AgentAddress, ProtectSettings } from './protect-settings.ts'
import type { VerifyReport } from './verify-procedure.ts'
import type { VerifyRecord, VerifyRecords } from './verify-record.ts'
import type { Hold } from './suspension.ts'
import type { VmState } from './vm-state.ts'
import { GroupView, noPeers } from './vpg-peers.ts'
import type { VpgPeers } from './vpg-peers.ts'

/** What an operator defines. */
export type VpgDefinition = { name: string; vmIds: number[]; checkpointEveryMs: number; /** Whose need of a limited line counts more; normal if it is absent. */ priority?: Priority; /** In which this site has the group; the first one if it is absent. */ generation?: number }

export type VpgEvent = { level: 'info' | 'warn' | 'error'; kind: string; message: string; context: Record<string, string | number> }

export type VpgOptions = {
  definition: VpgDefinition
  settings: ProtectSettings
  agent: AgentAddress
  /** Without them this node is alone, and all members are here. */
  peers?: VpgPeers
  /** The node of each member; see `place`. */
  nodeOf?: ReadonlyMap<number, string>
  /** How long acknowledgements may be held for a cut over several nodes. */
  holdMs?: number
  log: Logger
  onEvent: (event: VpgEvent) => void
  /** Where results of online verifies are kept. */
  verifies?: VerifyRecords
  nowUnixMs?: () => number
}

type Checkpoint = { id: string; atUnixMs: number }

const HOLD_MS = 20
const COMMIT_ANSWER_MS = 500
/** A cut that came to nothing because somebody was slow is tried so often in all. */
const ATTEMPTS = 3
const ATTEMPT_PAUSE_MS = 50

/**
 * A virtual protection group as one node has it: the members that run here are protected here; the others are known by what their nodes
 * say. One node, the coordinator, cuts for all; each takes part in the cuts of the others.
 */
export class Vpg implements AsyncDisposable {
  readonly definition: VpgDefinition
  readonly #options: VpgOptions
  readonly #log: Logger
  readonly #clock = new GroupClock()
  readonly #labels = new CheckpointLabels()
  readonly #nowUnixMs: () => number
  readonly #here = new Map<number, ProtectedVm>()
  readonly #part: LocalPart
  readonly #watch = new MemberWatch()
  readonly #fence: GroupFence
  #saidAhead = false
  readonly #leaving = new Map<number, Promise<void>>()
  #view: GroupView
  #started = false
  #stopped = false
  #schedule: Disposable | undefined
  #cuts: Promise<unknown> = Promise.resolve()
  #abandonedCuts = 0
  #saidWhy = ''
  #lastValid: Checkpoint | undefined
  /** Monotonic: when it was first heard of. */
  #lastValidSeenMs = 0

  constructor(options: VpgOptions) {
    const { definition, log, nowUnixMs } = options
    this.#options = options
    this.definition = definition
    this.#log = log.child({ vpg: definition.name })
    this.#nowUnixMs = nowUnixMs ?? Date.now
    this.#view = new GroupView(definition.vmIds, options.nodeOf ?? new Map(definition.vmIds.map((vmId) => [vmId, this.peers.nodeName])))
    this.#fence = new GroupFence({ stateDirectory: options.settings.stateDirectory, vpg: definition.name, generation: definition.generation, log: this.#log, nowUnixMs: this.#nowUnixMs })
    this.#fence.subscribe((fence) => this.#onFenced(fence))
    this.#part = new LocalPart(() => this.#membersHere(), options.holdMs ?? HOLD_MS)
    this.#takeIn()
  }

  /** The members on this node, in the order of the definition. */
  get vms(): readonly ProtectedVm[] {
    return this.definition.vmIds.flatMap((vmId) => this.#here.get(vmId) ?? [])
  }

  get view(): GroupView {
    return this.#view
  }

  get peers(): VpgPeers {
    return this.#options.peers ?? noPeers
  }

  /** The newest checkpoint that the agent called valid, as far as it said so to any node that answers. */
  get lastValid(): Checkpoint | undefined {
    let newest = this.#lastValid
    for (const node of this.otherNodes) {
      const news = this.peers.news(node, this.definition.name)
      const theirs = news.known ? news.report?.lastValid : undefined
      if (theirs !== undefined && theirs.atUnixMs > (newest?.atUnixMs ?? 0)) newest = theirs
    }
    if (newest !== undefined) this.#noteValid(newest)
    return newest
  }

  /** How old the newest valid checkpoint is, in ms; undefined without one. Also by a clock that nobody can set: one that steps back makes nothing younger. */
  lastValidAgeMs(nowUnixMs: number): number | undefined {
    const { lastValid } = this
    return lastValid && Math.max(0, nowUnixMs - lastValid.atUnixMs, performance.now() - this.#lastValidSeenMs)
  }

  /** Cuts that were begun by this node, or could not be, because of a member's node, and did not become a checkpoint. */
  get abandonedCuts(): number {
    return this.#abandonedCuts
  }

  /** The newest verify of a member that is here. */
  verified(vmId: number): VerifyRecord | undefined {
    return this.#options.verifies?.known(vmId)
  }

  /** The nodes of members that are not here. */
  get otherNodes(): string[] {
    return this.#view.nodes.filter((node) => node !== this.peers.nodeName)
  }

  start(): void {
    this.#started = true
    for (const vm of this.vms) vm.start()
    this.#schedule = scheduleCheckpoints(this.definition.checkpointEveryMs, this.#log, () => this.#cutOnSchedule())
  }

  /** Called every second or so. Members may have moved. One that is on no node any more (deleted, or nobody knows) stays with the node that had it. */
  place(nodeOf: ReadonlyMap<number, string>): void {
    if (this.#stopped) return
    const withOurs = new Map(nodeOf)
    for (const vmId of this.#here.keys()) if (!withOurs.has(vmId)) withOurs.set(vmId, this.peers.nodeName)
    this.#view = new GroupView(this.definition.vmIds, withOurs)
    for (const [vmId, vm] of this.#here) {
      if (withOurs.get(vmId) === this.peers.nodeName) continue
      this.#here.delete(vmId)
      this.#log.info('a member has left this node', { vmId, node: withOurs.get(vmId) })
      this.#leaving.set(vmId, vm.stop(true).finally(() => this.#leaving.delete(vmId)))
    }
    for (const vm of this.#takeIn()) if (this.#started) vm.start()
    this.#watchMembers(nodeOf)
  }

  /**
   * Cuts a tagged checkpoint now, or has the coordinator cut it.
   * @returns its id and label; it is valid when the agent says so
   * @throws CdpError CONFLICT when a VM of the group is not in step, or a node does not take part; UNREACHABLE, TIMEOUT of the coordinator
   */
  async tag(tag: string, forwarded = false): Promise<Checkpoint> {
    const { coordinator } = this.#view
    if (coordinator !== undefined && coordinator !== this.peers.nodeName) {
      if (forwarded) throw new CdpError('CONFLICT', `node ${this.peers.nodeName} does not cut for ${this.definition.name}: ${coordinator} does`, { retry: true, hint: 'Try again: a VM has just moved.' })
      return this.peers.tag(coordinator, this.definition.name, tag)
    }
    return this.#inTurn(async () => {
      const obstacle = this.#obstacle()
      if (obstacle !== undefined) {
        throw new CdpError('CONFLICT', `no checkpoint of ${this.definition.name} can be cut: ${obstacle.why}`, { retry: true, hint: 'Wait until all VMs of the group are streaming.' })
      }
      const { checkpoint, outcome } = await this.#attempt('tagged', tag)
      if (!outcome.ok) throw new CdpError('CONFLICT', `the checkpoint was abandoned: ${outcome.why}`, { retry: true, hint: 'Try again.' })
      return checkpoint
    })
  }

  /**
   * Compares members with the recovery site again, and sends what differs. Without `vmId` all members.
   * @returns those that sync now
   * @throws CdpError CONFLICT if one is not in step or not on this node, NOT_FOUND; nothing was begun then
   */
  forceSync(vmId?: number): number[] {
    const vms = this.#chosen(vmId)
    for (const vm of vms) vm.forceSync('forced by an operator')
    return vms.map((vm) => vm.vmId)
  }

  /** Begins an online verify of members, one after the other; `status` and events tell of it. @throws as forceSync */
  beginVerify(vmId?: number): number[] {
    const vms = this.#chosen(vmId)
    void (async () => {
      for (const vm of vms) {
        await vm.verify().catch((error: unknown) => {
          this.#options.onEvent({ level: 'warn', kind: 'verify-ended', message: `the verify of VM ${vm.vmId} did not come to its end: ${errorMessage(error)}`, context: { vpg: this.definition.name, vmId: vm.vmId } })
        })
      }
    })()
    return vms.map((vm) => vm.vmId)
  }

  /** This node's part in cuts over several nodes, for whoever coordinates them. */
  get part(): LocalPart {
    return this.#part
  }

  /** @throws CdpError CONFLICT if somebody else's operation keeps capture in a member that is here. A QEMU that does not answer is no reason. */
  async mustBeTakeable(): Promise<void> {
    await Promise.all(this.vms.map((vm) => vm.mustBeTakeable().catch((error: unknown) => {
      // A socket that too many wait for is a CONFLICT as well, of no job.
      if (error instanceof CdpError && error.code === 'CONFLICT' && error.context['job'] !== undefined) throw error
    })))
  }

  async stop(keepBitmaps: boolean): Promise<void> {
    this.#stopped = true
    this.#schedule?.[Symbol.dispose]()
    this.#schedule = undefined
    await Promise.all([...this.vms.map((vm) => vm.stop(keepBitmaps)), ...this.#leaving.values()])
    if (!keepBitmaps) await this.#fence.forget()
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.stop(true)
  }

  /** Makes what protects the members that are here and are not protected yet; one that has just left is first let go of. */
  #takeIn(): ProtectedVm[] {
    const { definition, settings, agent } = this.#options
    const fresh = definition.vmIds.filter((vmId) => this.#view.nodeOf.get(vmId) === this.peers.nodeName && !this.#here.has(vmId) && !this.#leaving.has(vmId)).map((vmId) => new ProtectedVm({
      vmId, vpg: definition.name, vms: definition.vmIds.map(String), settings, agent, arrived: this.#started, groupClock: this.#clock.buffer, fence: this.#fence, log: this.#log, nowUnixMs: this.#nowUnixMs,
      onAhead: (disowned) => this.#onAhead(disowned),
      onChange: (id, state) => this.#onChange(id, state),
      onNews: (news) => this.#onNews(news),
      onVerified: (id, report, where) => this.#onVerified(id, report, where),
      onJoined: (id, key) => this.#onJoined(id, key),
      // The instant of a round is its own: with another VM in the group it would be no cut.
      ...(definition.vmIds.length === 1 ? { roundMark: () => this.#newMark('automatic') } : {}),
      onHoldExpired: (vmId, hold) => this.#onHoldExpired(vmId, hold),
    }))
    for (const vm of fresh) {
      this.#here.set(vm.vmId, vm)
      // For the status; a verify reads it again.
      this.#options.verifies?.read(vm.vmId).catch((error: unknown) => this.#log.warn('the result of the last verify cannot be read', { vmId: vm.vmId, error: errorMessage(error) }))
    }
    return fresh
  }

  #chosen(vmId?: number): ProtectedVm[] {
    const wanted = vmId === undefined ? this.definition.vmIds : [vmId]
    return wanted.map((id) => {
      if (!this.definition.vmIds.includes(id)) throw new CdpError('NOT_FOUND', `VM ${id} is not in ${this.definition.name}`, { hint: `It protects VM ${this.definition.vmIds.join(', ')}.` })
      const vm = this.#here.get(id)
      const node = this.#view.nodeOf.get(id)
      if (vm === undefined) throw new CdpError('CONFLICT', `VM ${id} is ${node === undefined ? 'on no node of this cluster' : `on node ${node}`}`, { hint: 'Run the command on the node that has it, with --vm.' })
      if (vm.state.is !== 'streaming') throw new CdpError('CONFLICT', `VM ${id} is ${vm.state.is} (${vm.state.why})`, { retry: true, hint: 'Wait until it is streaming; whatever brings it in step again syncs it.' })
      return vm
    })
  }

  #onJoined(vmId: number, key: string): void {
    this.#options.onEvent({ level: 'info', kind: 'disk-joined', message: `${key} of VM ${vmId} belongs to checkpoints from now on`, context: { vpg: this.definition.name, vmId } })
  }

  #onVerified(vmId: number, report: VerifyReport, where: string): void {
    const { comparedBytes, undecidedBytes, differingBytes } = report
    const context = { vpg: this.definition.name, vmId, comparedBytes, undecidedBytes, differingBytes }
    const undecided = undecidedBytes > 0 ? `; ${undecidedBytes} bytes were written all the time and are undecided` : ''
    if (differingBytes > 0) this.#options.onEvent({ level: 'error', kind: 'verify-difference', message: `VM ${vmId}: ${differingBytes} bytes differ at the recovery site: ${where}; they are synced now${undecided}`, context })
    else this.#options.onEvent({ level: 'info', kind: 'verified', message: `VM ${vmId}: the recovery site holds what the source has${undecided}`, context })
    this.#options.verifies?.write(vmId, this.#nowUnixMs(), report).catch((error: unknown) => this.#log.warn('the result of a verify could not be kept', { vmId, error: errorMessage(error) }))
  }

  async #cutOnSchedule(): Promise<void> {
    if (this.#view.coordinator !== this.peers.nodeName) return
    await this.#inTurn(async () => {
      const obstacle = this.#obstacle()
      if (obstacle === undefined) await this.#attempt('automatic')
      else if (obstacle.abandons) this.#abandon(obstacle.why)
    })
  }

  /** Why no cut can be begun now. `abandons`: it is another node that fails us; a member that is not in step is no failed cut. */
  #obstacle(): { why: string; abandons: boolean } | undefined {
    const unknown: string[] = []
    const behind = this.#behind()
    if (this.#view.unplaced.length > 0) behind.push(`VM ${this.#view.unplaced.join(', ')} is on no node of this cluster`)
    for (const node of this.otherNodes) {
      const news = this.peers.news(node, this.definition.name)
      if (!news.known) unknown.push(news.why)
      else if (news.report === undefined) behind.push(`node ${node} has not taken the group up yet`)
      else behind.push(...news.report.vms.filter(({ state }) => state !== 'streaming').map(({ vmId, state, reason }) => `VM ${vmId} is ${state} (${reason})`))
    }
    if (unknown.length === 0 && behind.length === 0) return undefined
    return { why: [...behind, ...unknown].join('; '), abandons: behind.length === 0 }
  }

  #behind(): string[] {
    return this.vms.filter(({ streamingWorker }) => streamingWorker === undefined).map(({ vmId, state }) => `VM ${vmId} is ${state.is} (${state.why})`)
  }

  /** Cuts; tries again when somebody was only too slow. Each abandoned try is counted. */
  async #attempt(kind: CheckpointKind, tag?: string): Promise<{ checkpoint: Checkpoint; outcome: CutOutcome }> {
    for (let attempt = 1; ; attempt++) {
      const mark = this.#newMark(kind, tag)
      const { id, atUnixMs } = mark
      const outcome = await this.#cut(mark)
      if (outcome.ok) this.#saidWhy = ''
      else this.#abandon(outcome.why)
      if (outcome.ok || outcome.retry !== true || attempt === ATTEMPTS || this.#stopped) return { checkpoint: { id, atUnixMs }, outcome }
      await new Promise((resolve) => setTimeout(resolve, ATTEMPT_PAUSE_MS))
    }
  }

  #newMark(kind: CheckpointKind, tag?: string): CheckpointMark {
    const { name, vmIds } = this.definition
    const atUnixMs = this.#labels.next(Math.max(this.#nowUnixMs(), (this.lastValid?.atUnixMs ?? 0) + 1))
    return { id: `${atUnixMs.toString(36)}-${randomBytes(4).toString('hex')}`, vpg: name, vms: vmIds.map(String), atUnixMs, kind, ...(tag === undefined ? {} : { tag }) }
  }

  async #cut(mark: CheckpointMark): Promise<CutOutcome> {
    const others = this.otherNodes
    const workers = this.#workers()
    if (workers === undefined) return { ok: false, why: this.#behind().join('; ') }
    if (others.length === 0) return cutOnOneNode(this.#clock, workers, mark)
    return cutOverNodes({
      participants: [...others.map((node) => this.peers.participant(node)), this.#asParticipant()],
      vmIds: this.definition.vmIds, cutId: mark.id, mark, holdMs: this.#options.holdMs ?? HOLD_MS, commitAnswerMs: COMMIT_ANSWER_MS,
    })
  }

  #asParticipant(): CutParticipant {
    return {
      node: this.peers.nodeName,
      hold: (_vpg, cutId, holdMs) => this.#part.hold(cutId, holdMs),
      commit: (_vpg, cutId, mark) => this.#part.commit(cutId, mark),
      release: (_vpg, cutId) => this.#part.release(cutId),
    }
  }

  #abandon(why: string): void {
    this.#abandonedCuts++
    // Once a second the same reason is one event; the count says how often.
    if (why === this.#saidWhy) return
    this.#saidWhy = why
    this.#options.onEvent({ level: 'info', kind: 'cut-abandoned', message: `a checkpoint of ${this.definition.name} was abandoned: ${why}`, context: { vpg: this.definition.name } })
  }

  /** One cut at a time: a worker can be held for one only. */
  async #inTurn<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#cuts.then(work)
    this.#cuts = result.catch(() => undefined)
    return result
  }

  #workers(): CaptureWorker[] | undefined {
    const workers = this.vms.flatMap(({ streamingWorker }) => streamingWorker ?? [])
    return workers.length === this.vms.length ? workers : undefined
  }

  #membersHere(): LocalMembers {
    const workers = this.#workers()
    if (workers === undefined) return { behind: this.#behind().join('; ') }
    if (workers.length === 0) return { behind: `node ${this.peers.nodeName} has not taken a member up yet` }
    return { vmIds: this.vms.map(({ vmId }) => vmId), workers }
  }

  #onChange(vmId: number, state: VmState): void {
    this.#options.onEvent({
      level: state.is === 'fenced' ? 'error' : state.is === 'tracking' ? 'warn' : 'info',
      kind: `vm-${state.is}`,
      message: `VM ${vmId} is ${state.is}: ${state.why}`,
      context: { vpg: this.definition.name, vmId },
    })
  }

  /** A member that nobody protects is an error to be told, not silence. */
  #watchMembers(nodeOf: ReadonlyMap<number, string>): void {
    const { name, vmIds } = this.definition
    const troubles = new Map<number, string>()
    for (const vmId of vmIds) {
      const node = nodeOf.get(vmId)
      if (node === undefined) troubles.set(vmId, 'it is on no node of this cluster any more')
      if (node === undefined || node === this.peers.nodeName) continue
      const news = this.peers.news(node, name)
      if (!news.known) troubles.set(vmId, `it is on node ${node}, and the plugin there does not say that it protects it: ${news.why}`)
      else if (news.report === undefined) troubles.set(vmId, `it is on node ${node}, and the plugin there does not know the group`)
    }
    for (const news of this.#watch.look(troubles, performance.now())) {
      const context = { vpg: name, vmId: news.vmId }
      if (news.is === 'back') this.#options.onEvent({ level: 'info', kind: 'member-back', message: `VM ${news.vmId} of ${name} is looked after again`, context })
      else this.#options.onEvent({ level: 'error', kind: 'member-unprotected', message: `VM ${news.vmId} of ${name} is not protected: ${news.why}`, context })
    }
  }

  #onFenced({ why, hint }: Fence): void {
    this.#options.onEvent({ level: 'error', kind: 'group-fenced', message: `capture of ${this.definition.name} has ended: ${why}. ${hint}`, context: { vpg: this.definition.name } })
  }

  #onAhead({ message, hint }: Disowned): void {
    if (this.#saidAhead) return
    this.#saidAhead = true
    this.#options.onEvent({ level: 'error', kind: 'group-ahead', message: `${message}. ${hint ?? ''}`, context: { vpg: this.definition.name } })
  }

  #onHoldExpired(vmId: number, { owner, reason }: Hold): void {
    this.#options.onEvent({
      level: 'warn', kind: 'suspension-expired', message: `capture of VM ${vmId} was held suspended by ${owner} (${reason}) up to its limit: the hold has ended`, context: { vpg: this.definition.name, vmId, owner },
    })
  }

  #onNews({ validCheckpoint }: StateNews): void {
    if (validCheckpoint !== undefined && validCheckpoint.atUnixMs > (this.#lastValid?.atUnixMs ?? 0)) this.#noteValid(validCheckpoint)
  }

  #noteValid(newest: Checkpoint): void {
    if (newest.id !== this.#lastValid?.id) this.#lastValidSeenMs = performance.now()
    this.#lastValid = newest
  }
}
