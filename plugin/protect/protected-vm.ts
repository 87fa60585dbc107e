import { join } from 'node:path'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import type { CaptureEvent, CaptureStats, CaptureWorker } from '../capture/index.ts'
import type { QemuDisk, VmLook } from '../qemu/index.ts'
import { RateCell } from '../replicate/index.ts'
import { coverFromHere, dropStill, lookAt, planForced, requireTakeable, retireBitmaps, rotateAndLook, runSync, takeAway } from './attach-procedure.ts'
import type { SyncPlan } from './attach-procedure.ts'
import { entriesInStep, meetAndAttach, openStream } from './attach-vm.ts'
import type { Attached } from './attach-vm.ts'
import { BackupRounds, roundableDisks } from './backup-rounds.ts'
import { BitmapRotation, totalOf } from './bitmap-rotation.ts'
import type { CaptureProver, Finding } from './capture-prover.ts'
import { DiskJoin } from './disk-join.ts'
import { handOver } from './hand-over.ts'
import { MigrationWatch } from './migration-watch.ts'
import { OnlineVerify } from './online-verify.ts'
import { spillOf } from './protect-settings.ts'
import type { ProtectedVmOptions } from './protect-settings.ts'
import { RunWatch } from './run-watch.ts'
import { StopWitness } from './stop-witness.ts'
import { Suspension } from './suspension.ts'
import type { Hold, HoldRequest } from './suspension.ts'
import { findRunningVm, whereaboutsOf } from './vm-files.ts'
import type { RunningVm } from './vm-files.ts'
import { describeRanges, verifyVm } from './verify-procedure.ts'
import type { VerifyReport } from './verify-procedure.ts'
import { agentIdOf, VmMemoryFile } from './vm-memory.ts'
import { next } from './vm-state.ts'
import type { Joining, VmEffect, VmEvent, VmState } from './vm-state.ts'
import { WorkLine } from './work-line.ts'
import { WorkerKeeper } from './worker-keeper.ts'

/** How long a QEMU that has said goodbye may take to be gone, for us to look often. */
const ENDING_MS = 10_000
/** Its connections close with a process; the worker needs a turn to see it. */
const CLOSED_DEADLINE_MS = 2_000
const BEAT_CHECK_MS = 200
/** Between Proxmox's lock and QEMU's own migration the target is started: a second at least. */
const MIGRATION_CHECK_MS = 250
/** Nobody's migration takes so long: whoever left the lock behind is told of. */
const MIGRATION: HoldRequest = { owner: 'migration', reason: 'Proxmox migrates the VM to another node', forMs: 24 * 3_600_000 }
const RETRY_FIRST_MS = 1_000
const RETRY_MAX_MS = 30_000
const ROUND_EVERY_MS = 10_000
/** While another operation holds a disk: it may be over at any moment. */
const RETRY_BLOCKED_MS = 2_000

/** Protection of one VM: watches for it, attaches capture, brings the agent in step, and begins again after whatever went wrong. */
export class ProtectedVm implements AsyncDisposable {
  readonly vmId: number
  readonly #options: ProtectedVmOptions
  readonly #log: Logger
  readonly #memory: VmMemoryFile
  readonly #suspension: Suspension
  readonly #migration: MigrationWatch
  readonly #workers: WorkerKeeper
  readonly #stops: StopWitness
  readonly #watch: RunWatch
  /** This VM's share of the line. */
  readonly rate = new RateCell()
  readonly #nowUnixMs: () => number
  readonly #unsubscribe: () => void
  #state: VmState
  #running: RunningVm | undefined
  #attachNumber = 0
  #attached: Attached | undefined
  /** Why everything is to be compared as soon as the VM is in step. */
  #owedSync: string | undefined
  readonly #verify: OnlineVerify
  #join: DiskJoin | undefined
  #prover: CaptureProver | undefined
  #rotation: BitmapRotation | undefined
  #proofBusy = false
  #takingOut: Promise<void> = Promise.resolve()
  #rounds: AbortController | undefined
  #retryMs = RETRY_FIRST_MS
  #timers: NodeJS.Timeout[] = []
  #retry: NodeJS.Timeout | undefined
  /** A verify takes hours: dirty bitmaps are rotated beside it, and whatever else comes ends it first. */
  readonly #line = new WorkLine()
  #polling: Promise<void> | undefined
  #looked = false
  #stopped = false

  constructor(options: ProtectedVmOptions) {
    this.vmId = options.vmId
    this.#options = options
    this.#log = options.log.child({ vmId: options.vmId })
    this.#verify = new OnlineVerify(options.vmId)
    this.#memory = new VmMemoryFile(options.settings.stateDirectory, options.vmId, agentIdOf(options.agent))
    this.#stops = new StopWitness({ stateDirectory: options.settings.stateDirectory, vmId: options.vmId, log: this.#log })
    this.#watch = new RunWatch(options.settings.paths.qemuServerDirectory, options.vmId, () => void (this.#polling ?? Promise.resolve()).then(() => this.#poll()))
    this.#nowUnixMs = options.nowUnixMs ?? Date.now
    this.#suspension = new Suspension({
      stateDirectory: options.settings.stateDirectory, vmId: options.vmId, log: this.#log, nowUnixMs: this.#nowUnixMs,
      onChange: () => this.#holdsChanged(),
      onExpired: (hold) => this.#options.onHoldExpired?.(this.vmId, hold),
    })
    this.#migration = new MigrationWatch({
      whereabouts: () => whereaboutsOf(options.settings.paths, options.vmId), arrived: options.arrived === true, log: this.#log,
      isHeld: () => this.holds.some(({ owner }) => owner === MIGRATION.owner),
      hold: () => this.#leave(),
      release: async () => void (await this.resume(MIGRATION.owner)),
    })
    const { vpg, vms, agent, groupClock, settings } = options
    this.#workers = new WorkerKeeper({
      worker: {
        vm: String(this.vmId), vpg, vms, generation: options.fence.generation, agent, groupClock, targetPath: this.#targetPath(), budgetBytes: settings.memoryBytesPerVm, lingerMs: settings.lingerMs, slowAck: settings.slowAck,
        ...spillOf(settings, this.vmId), rate: this.rate.buffer,
      },
      log: this.#log,
      onLost: (why) => this.#dispatch({ on: 'captureLost', why }),
      onGoodbye: (atUnixMs) => this.#onGoodbye(atUnixMs),
      onSync: (progress) => this.#onSync(progress),
      // What waits for the link need not wait for the next try.
      onLinkUp: () => {
        if (this.#state.is === 'tracking') this.#dispatch({ on: 'retry' })
      },
      onDisowned: (disowned) => (disowned.verdict === 'superseded' ? options.fence.raise(disowned) : options.onAhead?.(disowned)),
      onNews: (news) => {
        if (news.syncWanted !== undefined) this.#owe(`the recovery site asks for it: ${news.syncWanted.why}`)
        options.onNews(news)
      },
    })
    this.#unsubscribe = options.fence.subscribe(() => this.#fenced())
    this.#state = { is: 'detached', why: 'the VM has not been looked for yet', sinceUnixMs: this.#nowUnixMs() }
  }

  get state(): VmState {
    return this.#state
  }

  get stats(): CaptureStats | undefined {
    return this.#workers.stats
  }

  get workerHangs(): boolean {
    return this.#workers.hangs
  }

  /** Who holds capture suspended, oldest first. */
  get holds(): readonly Hold[] {
    return this.#suspension.holds
  }

  get disks(): readonly DiskEntry[] {
    return this.#workers.disks
  }

  /** The worker, while what it captures is complete and in step. */
  get streamingWorker(): CaptureWorker | undefined {
    return this.#state.is === 'streaming' ? this.#workers.worker : undefined
  }

  /** Disks that are no part of a checkpoint yet. */
  get joining(): Joining | undefined {
    return this.#state.is === 'streaming' ? this.#state.joining : undefined
  }

  /** How far the verify has come that runs now. */
  get verifying(): { comparedBytes: number; totalBytes: number } | undefined {
    const { comparedBytes } = this.#verify
    return comparedBytes === undefined ? undefined : { comparedBytes, totalBytes: this.disks.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0) }
  }

  /**
   * Compares everything with the recovery site again and sends what differs; `state` tells of it. A verify that runs ends.
   * @throws CdpError CONFLICT if the VM is not in step, or the recovery site cannot compare
   */
  forceSync(why: string): void {
    this.#mustCompare()
    this.#dispatch({ on: 'syncForced', why })
  }

  /**
   * Compares the disks with what the recovery site holds, without ending anything. What differs makes the VM sync.
   * @throws CdpError CONFLICT if the VM is not in step, the recovery site cannot compare, or a verify runs; ABORTED when something else goes first
   */
  async verify(): Promise<VerifyReport> {
    const { context, disks, entries } = this.#mustCompare()
    const { rateBytesPerSec } = this.#options.settings.verify
    const { joining } = this
    if (joining !== undefined && joining.failed === undefined) throw new CdpError('CONFLICT', `${joining.keys.join(', ')} of VM ${this.vmId} is being copied for the first time`, { retry: true, hint: 'Verify when it belongs to checkpoints; see "pvecdp status".' })
    const report = await this.#verify.run((options) => this.#line.runLong(() => verifyVm(context, disks, entries, { rateBytesPerSec, ...options })))
    const where = describeRanges(report.differences, entries)
    this.#options.onVerified?.(this.vmId, report, where)
    if (report.differingBytes > 0) this.#owe(`verify found ${report.differingBytes} bytes that differ: ${where}`)
    return report
  }

  start(): void {
    this.#timers.push(
      setInterval(() => this.#workers.checkBeat(), BEAT_CHECK_MS),
      setInterval(() => this.#looked && void this.#migration.look(), MIGRATION_CHECK_MS),
      setInterval(() => void this.#prove(), this.#options.settings.proofEveryMs),
      setInterval(() => void this.#rotation?.turn(), this.#options.settings.rotateEveryMs),
    )
    this.#watch.start()
  }

  /**
   * Takes capture out of QEMU for a while; bitmaps go on recording. Resolves when no job is in QEMU any more. Asked again by the same owner, the
   * reason and the limit are the new ones.
   * @throws CdpError CONFLICT while a backup or disk move of somebody else holds a disk (nothing was changed); QMP_*, TIMEOUT: this owner holds what he held before
   */
  async suspend(request: HoldRequest): Promise<Hold> {
    this.#mustGoOn()
    await this.#suspension.load()
    if (!this.#looked) await this.#poll()
    const capturing = this.#state.is === 'attaching' || this.#state.is === 'syncing' || this.#state.is === 'streaming'
    if (capturing) await this.mustBeTakeable()
    this.#mustGoOn()
    const isRenewed = this.holds.some(({ owner }) => owner === request.owner)
    const hold = await this.#suspension.add(request)
    try {
      if (this.#running !== undefined) await this.#takingOut
    } catch (error) {
      this.#takingOut = Promise.resolve()
      // What he does under the hold that he had goes on: nothing may attach.
      if (isRenewed) throw error
      if (this.holds.length === 1) this.#dispatch({ on: 'suspendFailed', why: `capture could not be suspended: ${errorMessage(error)}` })
      await this.#suspension.release(request.owner)
      throw error
    }
    return hold
  }

  /** @throws CdpError CONFLICT while a backup or disk move of somebody else holds a disk that we are on: nothing can be taken out of QEMU then; QMP_* */
  async mustBeTakeable(): Promise<void> {
    if (this.#running !== undefined) await requireTakeable(this.#running)
  }

  /** That owner holds capture suspended no longer; it begins again when nobody does. False if he held nothing. */
  resume(owner: string): Promise<boolean> {
    return this.#suspension.release(owner)
  }

  /** Ends protection. Bitmaps stay if it will go on later (restart, upgrade), else nothing of ours is left in QEMU. */
  async stop(keepBitmaps: boolean): Promise<void> {
    if (this.#stopped) return
    this.#stopped = true
    for (const timer of this.#timers) clearInterval(timer)
    clearTimeout(this.#retry)
    this.#unsubscribe()
    this.#watch[Symbol.dispose]()
    this.#suspension[Symbol.dispose]()
    this.#leaveStep()
    this.#attachNumber++
    this.#verify.end('protection ends')
    this.#endJoin('protection ends')
    // In step: the worker takes what QEMU still sends, and lets no marker in behind it.
    await this.#workers.letGo('protection ends', this.#state.is === 'streaming')
    await this.#line.idle()
    this.#dispatch({ on: 'stop', why: 'protection was ended' })
    if (this.#running !== undefined) {
      await takeAway(this.#running, this.#readSocketPath(), keepBitmaps).catch((error: unknown) => {
        this.#log.error('capture could not be taken out of QEMU', { error: errorMessage(error) })
      })
    }
    await this.#workers.end()
    if (!keepBitmaps) await Promise.all([this.#memory.forget(), this.#suspension.forget(), this.#stops.forget()])
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.stop(true)
  }

  #targetPath(): string {
    return join(this.#options.settings.runDirectory, `capture-${this.vmId}.sock`)
  }

  #readSocketPath(): string {
    return join(this.#options.settings.runDirectory, `read-${this.vmId}.sock`)
  }

  #dispatch(event: VmEvent): void {
    if (this.#stopped && event.on !== 'stop') return
    const before = this.#state
    const { state, effects } = next(before, event, this.#nowUnixMs())
    this.#state = state
    if (state.is !== before.is) {
      this.#log.info(`VM ${this.vmId}: ${before.is} -> ${state.is}`, { why: state.why })
      this.#options.onChange(this.vmId, state)
    }
    for (const effect of effects) this.#perform(effect)
  }

  #perform(effect: VmEffect): void {
    switch (effect.do) {
      case 'attach': {
        this.#supersede(effect.why)
        const attachNumber = this.#attachNumber
        this.#enqueue(() => this.#attach(attachNumber, effect.why, effect.sameStream === true))
        return
      }
      case 'compareAll': {
        this.#verify.end('a sync begins')
        this.#endJoin('a sync begins')
        const attachNumber = this.#attachNumber
        this.#enqueue(() => this.#compareAll(attachNumber, effect.why))
        return
      }
      case 'takeOut':
        this.#supersede(this.#state.why, true)
        this.#takingOut = this.#line.run(() => this.#takeOut())
        this.#takingOut.catch((error: unknown) => {
          this.#log.warn('capture could not be taken out of QEMU', { error: errorMessage(error) })
          this.#dispatch({ on: 'takeOutFailed' })
        })
        return
      case 'remove':
        this.#supersede(this.#state.why, true)
        this.#enqueue(() => this.#remove())
        return
      case 'cleanUp':
        this.#supersede(this.#state.why)
        this.#enqueue(() => this.#cleanUp())
        return
      case 'forgetRetry':
        clearTimeout(this.#retry)
        this.#retryMs = RETRY_FIRST_MS
        return
      case 'retryLater':
        clearTimeout(this.#retry)
        this.#retry = setTimeout(() => this.#dispatch({ on: 'retry' }), this.#retryMs)
        this.#retryMs = Math.min(RETRY_MAX_MS, this.#retryMs * 2)
        return
    }
  }

  /** Whatever attach is under way ends at its next step, and the sync it waits for ends at once: it could take hours. */
  #supersede(why: string, inPeace = false): void {
    this.#leaveStep()
    this.#attachNumber++
    this.#verify.end(why)
    this.#endJoin(why)
    void this.#workers.letGo(why, inPeace)
  }

  #owe(why: string): void {
    this.#owedSync = why
    if (this.#state.is === 'streaming') this.#dispatch({ on: 'syncForced', why })
  }

  #mustCompare(): Attached {
    const attached = this.#attached
    if (this.streamingWorker === undefined || attached === undefined) {
      throw new CdpError('CONFLICT', `VM ${this.vmId} is ${this.#state.is} (${this.#state.why})`, { retry: true, hint: 'Wait until it is streaming; whatever brings it in step again syncs it.' })
    }
    if (!attached.hashes) throw new CdpError('CONFLICT', 'the recovery site cannot compare by hash', { hint: 'Install the same version of pve-cdp on both sites.' })
    return attached
  }

  #onSync({ doneBytes, totalBytes, sentBytes, durable, durableSeq }: Extract<CaptureEvent, { is: 'sync' }>): void {
    if (durable !== undefined && this.#running !== undefined) {
      this.#memory.noteProgress(this.#running.instance, durable, durableSeq).catch((error: unknown) => this.#log.warn('the progress of a sync could not be kept', { error: errorMessage(error) }))
    }
    if (this.#state.is === 'streaming') this.#join?.advanced(doneBytes, totalBytes)
    this.#dispatch({ on: 'syncAdvanced', doneBytes, totalBytes, sentBytes })
  }

  /** QEMU ended capture as it does when it ends itself. Whether it does so is seen by its process. */
  #onGoodbye(atUnixMs: number): void {
    if (this.#state.is === 'streaming' && this.#attached !== undefined) {
      const doubt = this.#prover === undefined ? 'nothing was compared' : this.#prover.doubt(3 * this.#options.settings.proofEveryMs + 5_000)
      this.#stops.goodbye(atUnixMs, this.#owedSync ?? doubt, this.#attached.disks, entriesInStep(this.#attached))
    }
    this.#watch.hurry(ENDING_MS)
    this.#dispatch({ on: 'captureLost', why: 'QEMU ended capture' })
  }

  #leaveStep(): void {
    this.#workers.watchesTargets = false
    this.#prover = undefined
    this.#rotation = undefined
    this.#rounds?.abort(new CdpError('ABORTED', 'the rounds are over'))
  }

  #enqueue(work: () => Promise<void>): void {
    this.#line.run(async () => {
      if (!this.#stopped) await work()
    }).catch((error: unknown) => this.#log.error('unexpected failure', { error: errorMessage(error) }))
  }

  #mustGoOn(): void {
    if (this.#stopped) throw new CdpError('CLOSED', `protection of VM ${this.vmId} has ended`)
  }

  /** Somebody holds capture suspended now, or nobody does any more. */
  #holdsChanged(): void {
    const { why } = this.#suspension
    this.#dispatch(why === undefined ? { on: 'resume' } : { on: 'suspend', why, running: this.#running !== undefined })
  }

  /** The VM is about to leave this node. */
  async #leave(): Promise<void> {
    if (!this.#looked) return void (await this.#suspension.add(MIGRATION))
    await this.suspend(MIGRATION)
    await this.#line.run(async () => {
      const vm = this.#running
      if (vm !== undefined && this.#state.is === 'suspended' && !this.#stopped) await handOver(vm, this.#memory)
    }).catch((error: unknown) => this.#log.warn('the next node has to compare everything: what is in the dirty bitmaps could not be handed over', { error: errorMessage(error) }))
  }

  async #takeOut(): Promise<void> {
    const vm = this.#running
    if (vm !== undefined && !this.#stopped) await takeAway(vm, this.#readSocketPath(), true)
    // What is left are connections that QEMU has not ended: of a job that it had lost before.
    await this.#workers.letGo(this.#state.why)
  }

  #poll(): Promise<void> {
    return (this.#polling ??= this.#lookForVm().finally(() => (this.#polling = undefined)))
  }

  async #lookForVm(): Promise<void> {
    if (this.#stopped) return
    try {
      await Promise.all([this.#suspension.load(), this.#options.fence.load()])
      // Met in the middle of a migration: nothing is attached to begin with.
      if (!this.#looked) await this.#migration.look()
      const running = await findRunningVm(this.#options.settings.paths, this.vmId)
      if (this.#stopped || (this.#looked && running?.instance === this.#running?.instance)) return
      const why = running === undefined ? undefined : await this.#whyMet(running)
      if (this.#running !== undefined) await this.#noteStop(running !== undefined)
      if (this.#stopped) return
      this.#looked = true
      this.#running = running
      if (this.#options.fence.standing !== undefined && this.#state.is !== 'fenced') return this.#fenced()
      const held = this.#suspension.why
      this.#dispatch(running === undefined ? { on: 'vmStopped' } : { on: 'vmStarted', why, ...(held === undefined ? {} : { held }) })
    } catch (error) {
      this.#log.warn('the VM could not be looked for', { error: errorMessage(error) })
    }
  }

  /** The QEMU that was there has ended; what was seen of that is kept before anything is done to another one. */
  async #noteStop(restarted: boolean): Promise<void> {
    this.#watch.calm()
    await this.#workers.allClosed(CLOSED_DEADLINE_MS)
    if (!restarted) await this.#stops.gone()
    const { why } = this.#state
    this.#enqueue(() => this.#stops.stopped(why))
  }

  /** Met at the first look with a memory of this very QEMU: it was protected before, by an earlier life of the plugin. */
  async #whyMet(running: RunningVm): Promise<string> {
    if (this.#looked) return 'the VM was started'
    if ((await this.#memory.read(running.instance)) !== undefined) return 'the plugin was started again'
    return this.#options.arrived === true ? 'the VM came to this node' : 'the VM runs'
  }

  async #attach(attachNumber: number, why: string, sameStream: boolean): Promise<void> {
    const vm = this.#running
    if (vm === undefined || attachNumber !== this.#attachNumber) return
    const superseded = (): boolean => attachNumber !== this.#attachNumber
    try {
      const met = await meetAndAttach({
        vm, why, sameStream, superseded, vmId: this.vmId, settings: this.#options.settings, generation: this.#options.fence.generation, before: this.#attached,
        workers: this.#workers, stops: this.#stops, memory: this.#memory, log: this.#log, targetPath: this.#targetPath(), readSocketPath: this.#readSocketPath(), nowUnixMs: this.#nowUnixMs,
      })
      if (met === undefined) return
      const { attached, prover, plan } = met
      if (plan === undefined) return await this.#goOnWithoutSync(attachNumber, attached, prover, met.durableSeq)
      if (superseded()) return
      await this.#stops.forget()
      this.#attached = attached
      this.#dispatch({ on: 'syncBegan', kind: plan.kind, why: plan.why, totalBytes: 0 })
      if (!prover.looked) await this.#lookDrained(prover, vm)
      if (!(await this.#sync(attached, plan, superseded))) return
      const rotation = await this.#rotationFor(attachNumber, attached, prover)
      if (superseded()) return
      this.#prover = prover
      this.#rotation = rotation
      this.#arriveFrom(plan)
    } catch (error) {
      if (superseded()) return
      const message = errorMessage(error)
      const blocked = error instanceof CdpError && error.code === 'CONFLICT' && error.retry
      this.#log.warn('protection did not come into step', { error: message })
      if (blocked) this.#retryMs = RETRY_BLOCKED_MS
      if (blocked && !this.#workers.watchesTargets && (await this.#inRounds(vm, why, superseded))) return
      if (this.#workers.watchesTargets) {
        this.#dispatch({ on: 'syncFailed', why: message })
      } else {
        const bitmapRecords = (await this.#memory.read(vm.instance).catch(() => undefined)) !== undefined
        if (superseded()) return
        this.#dispatch({ on: 'attachFailed', why: blocked ? `waits for the end of a backup or another operation of Proxmox: ${message}` : message, bitmapRecords })
      }
    }
  }

  /** Incremental rounds for as long as a backup is in the way. False if there can be none. */
  async #inRounds(vm: RunningVm, why: string, superseded: () => boolean): Promise<boolean> {
    const { roundMark, settings } = this.#options
    const disks = roundMark === undefined ? undefined : await roundableDisks(vm, this.#memory).catch((error: unknown) => void this.#log.info('no incremental rounds', { why: errorMessage(error) }))
    if (roundMark === undefined || disks === undefined || superseded()) return disks !== undefined
    const rounds = new AbortController()
    this.#rounds = rounds
    this.#dispatch({ on: 'roundsBegan', why: 'waiting for the end of a backup: incremental rounds' })
    try {
      await new BackupRounds({
        qmpPath: vm.qmpPath, targetPath: this.#targetPath(), disks, mark: roundMark, everyMs: settings.roundEveryMs ?? ROUND_EVERY_MS, log: this.#log, signal: rounds.signal,
        open: () => openStream(this.#workers, settings.paths, vm, this.#memory, disks, why),
        noteDurable: (seq) => this.#memory.noteDurable(vm.instance, seq),
        isOpen: (key) => this.#workers.isOpen(key),
        letGo: (reason) => this.#workers.letGo(reason),
        waitingBytes: () => (this.#workers.stats?.heldBytes ?? 0) + (this.#workers.stats?.spilledBytes ?? 0),
        onRound: ({ atUnixMs }) => this.#dispatch({ on: 'roundDone', atUnixMs }),
        bytesPerSec: Math.floor(Math.min(settings.syncRateBytesPerSec || Infinity, settings.memoryBytesPerVm / 2) / disks.length),
        holdAboveBytes: settings.memoryBytesPerVm / 2,
      }).run()
      if (!superseded()) this.#dispatch({ on: 'roundsOver' })
    } catch (error) {
      if (!superseded()) this.#dispatch({ on: 'roundsFailed', why: errorMessage(error) })
    }
    return true
  }

  /** Carries a plan out; false if something else came first. */
  async #sync({ context, disks, entries }: Attached, plan: SyncPlan, superseded: () => boolean): Promise<boolean> {
    const lastSeq = await runSync(context, disks, entries, plan, this.#options.settings.syncRateBytesPerSec)
    if (superseded()) return false
    await context.worker.ask('durable', { seq: lastSeq })
    if (superseded()) return false
    await retireBitmaps(context, disks, lastSeq)
    this.#retryMs = RETRY_FIRST_MS
    if (plan.kind === 'delta') this.#owedSync = undefined
    return !superseded()
  }

  #arriveFrom(plan: SyncPlan): void {
    const sent = this.#state.is === 'syncing' && plan.kind === 'delta' ? `, ${this.#state.sentBytes ?? 0} bytes sent` : ''
    this.#arrive({ on: 'inStep', why: `${plan.kind} sync complete${sent}` })
  }

  #arrive(event: VmEvent): void {
    this.#dispatch(event)
    if (this.#state.is !== 'streaming') return
    if (this.#owedSync !== undefined) return this.#owe(this.#owedSync)
    if (this.#attached !== undefined && this.#attached.joining.length > 0) this.#beginJoin(this.#attached)
  }

  /** In step but for disks that came: those follow. */
  #beginJoin(attached: Attached): void {
    this.#endJoin('it begins anew')
    const join = new DiskJoin({
      attached, rateBytesPerSec: this.#options.settings.syncRateBytesPerSec, line: this.#line,
      onJoining: (joining) => this.#dispatch({ on: 'joining', joining }),
      onJoined: (whole, key) => {
        if (this.#attached?.context === whole.context) this.#attached = whole
        this.#options.onJoined?.(this.vmId, key)
      },
    })
    this.#join = join
    void join.run()
  }

  #endJoin(why: string): void {
    this.#join?.end(why)
    this.#join = undefined
  }

  /** Drained, and before anything is copied: it bounds what was written and not captured, and what it takes for that the copy has to bring. */
  async #lookDrained(prover: CaptureProver, vm: RunningVm): Promise<void> {
    await this.#check(prover, () => lookAt(vm, { drained: true, patient: true }))
  }

  /** The agent holds what the disks held when the VM started, and everything since then is captured. */
  async #goOnWithoutSync(attachNumber: number, attached: Attached, prover: CaptureProver, durableSeq: number): Promise<void> {
    const { context, disks } = attached
    await coverFromHere(context, disks, durableSeq)
    await context.worker.ask('inStep', {})
    const rotation = await this.#rotationFor(attachNumber, attached, prover)
    await this.#stops.forget()
    if (attachNumber !== this.#attachNumber) return
    this.#attached = attached
    this.#prover = prover
    this.#rotation = rotation
    this.#retryMs = RETRY_FIRST_MS
    this.#arrive({ on: 'nothingMissed', why: 'the VM was stopped and started; nothing was missed, no sync was needed' })
  }

  /** Everything is compared again while capture goes on. The memory says so first: after a crash the comparison goes on. */
  async #compareAll(attachNumber: number, why: string): Promise<void> {
    const attached = this.#attached
    const superseded = (): boolean => attachNumber !== this.#attachNumber
    if (superseded() || attached === undefined) return
    try {
      await this.#memory.write(attached.context.vm.instance, 'copying')
      if (superseded()) return
      const plan = planForced(why)
      if (await this.#sync(attached, plan, superseded)) this.#arriveFrom(plan)
    } catch (error) {
      if (superseded()) return
      this.#log.warn('the comparison did not come to its end', { error: errorMessage(error) })
      this.#dispatch({ on: 'syncFailed', why: errorMessage(error) })
    }
  }

  async #rotationFor(attachNumber: number, attached: Attached, prover: CaptureProver): Promise<BitmapRotation> {
    const { vm, worker } = attached.context
    const { bytes } = await worker.ask('captured', {})
    // Those of a disk that joins go on recording until it is covered.
    const disks = (): readonly QemuDisk[] => (this.#attached?.context === attached.context ? this.#attached : attached).disks
    return new BitmapRotation({
      worker, log: this.#log,
      exclusively: (work) => this.#line.runBeside(async () => (attachNumber === this.#attachNumber && this.#state.is === 'streaming' ? work() : undefined)),
      rotate: () => rotateAndLook(vm, disks()),
      check: (look) => this.#check(prover, look),
      retire: async (seq) => {
        await this.#memory.noteDurable(vm.instance, seq)
        await dropStill(vm, disks())
      },
      durable: async (seq) => void (await worker.ask('durable', { seq })),
    }, totalOf(bytes))
  }

  async #cleanUp(): Promise<void> {
    const vm = this.#running
    await this.#workers.letGo(this.#state.why)
    await this.#stops.streamEnded(this.#workers.worker)
    if (vm === undefined) return
    await takeAway(vm, this.#readSocketPath(), true).then(() => this.#stops.wentOn(), (error: unknown) => {
      this.#log.warn('what is left of capture in QEMU will be taken away with the next attach', { error: errorMessage(error) })
    })
  }

  #fenced(): void {
    this.#dispatch({ on: 'fenced', why: this.#options.fence.why ?? 'the recovery site has taken the group over' })
  }

  /** Nothing of ours is left; what is asked of a QEMU that is gone meanwhile does no harm. */
  async #remove(): Promise<void> {
    const vm = this.#running
    try {
      if (vm !== undefined) await takeAway(vm, this.#readSocketPath(), false)
      await this.#memory.forget()
    } catch (error) {
      this.#log.warn('capture of a fenced VM is not all out of QEMU yet', { error: errorMessage(error) })
      await this.#workers.letGo(this.#state.why)
      return this.#dispatch({ on: 'removeFailed' })
    }
    await this.#workers.end()
  }

  /** The slow poll. */
  async #prove(): Promise<void> {
    const prover = this.#prover
    const vm = this.#running
    if (prover === undefined || vm === undefined || this.#state.is !== 'streaming' || this.#proofBusy) return
    this.#proofBusy = true
    try {
      await this.#check(prover, () => lookAt(vm, { drained: false }))
    } catch (error) {
      this.#log.warn('the counters of the VM could not be compared', { error: errorMessage(error) })
    } finally {
      this.#proofBusy = false
    }
  }

  #check(prover: CaptureProver, look: () => Promise<VmLook>): Promise<Finding> {
    return prover.check(look, (finding) => {
      if (prover !== this.#prover) return
      if (finding.is === 'lost') this.#dispatch({ on: 'captureLost', why: finding.why })
      if (finding.is === 'changed') this.#dispatch({ on: 'disksChanged', why: finding.why })
    })
  }
}
