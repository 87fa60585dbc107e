import { join } from 'node:path'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { ClientTls } from '../../core/pki/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'
import type { StateNews } from '../../core/stream/index.ts'
import { CaptureWorker } from '../capture/index.ts'
import type { CaptureEvent, CaptureStats } from '../capture/index.ts'
import type { QemuDisk } from '../qemu/index.ts'
import { attachJobs, lookAtCounters, meetVm, planSync, retireBitmaps, runSync, takeAway, toDiskEntries } from './attach-procedure.ts'
import type { AttachContext } from './attach-procedure.ts'
import { CounterProof } from './counter-proof.ts'
import { findRunningVm, readVmConfig } from './vm-files.ts'
import type { ProxmoxPaths, RunningVm } from './vm-files.ts'
import { VmMemoryFile } from './vm-memory.ts'
import { next } from './vm-state.ts'
import type { VmEffect, VmEvent, VmState } from './vm-state.ts'

export type ProtectSettings = {
  paths: ProxmoxPaths
  stateDirectory: string
  /** Unix sockets of ours; short, see sun_path. */
  runDirectory: string
  memoryBytesPerVm: number
  lingerMs: number
  /** 0: no limit. */
  syncRateBytesPerSec: number
  proofEveryMs: number
  slowAck: { p99Ms: number; maxMs: number }
  /** NBD servers that run inside a VM's QEMU already, by VM id: syncs read through them. */
  existingNbdServers: Record<string, string>
}

export type AgentAddress = { host: string; port: number; tls: ClientTls }

export type ProtectedVmOptions = {
  vmId: number
  vpg: string
  vms: string[]
  settings: ProtectSettings
  agent: AgentAddress
  groupClock: SharedArrayBuffer
  log: Logger
  onChange: (vmId: number, state: VmState) => void
  onNews: (news: StateNews) => void
  nowUnixMs?: () => number
}

const POLL_MS = 1_000
const BEAT_CHECK_MS = 200
const HUNG_MS = 1_000
/** Together with the watchdog's own limit below 2 s. */
const SUSPICIOUS_MS = 600
const RETRY_FIRST_MS = 1_000
const RETRY_MAX_MS = 30_000
const END_DEADLINE_MS = 5_000
const IN_FLIGHT_BYTES = 16 * 1024 * 1024

/** Protection of one VM: watches for it, attaches capture, brings the agent in step, and begins again after whatever went wrong. */
export class ProtectedVm implements AsyncDisposable {
  readonly vmId: number
  readonly #options: ProtectedVmOptions
  readonly #log: Logger
  readonly #memory: VmMemoryFile
  readonly #nowUnixMs: () => number
  #state: VmState
  #running: RunningVm | undefined
  #worker: CaptureWorker | undefined
  #workerDisks: DiskEntry[] = []
  #openTargets = new Map<string, number>()
  #stats: CaptureStats | undefined
  #attachNumber = 0
  #watchingTargets = false
  #proofs = new Map<string, CounterProof>()
  #proofBusy = false
  #retryMs = RETRY_FIRST_MS
  #timers: NodeJS.Timeout[] = []
  #retry: NodeJS.Timeout | undefined
  #work: Promise<void> = Promise.resolve()
  #polling = false
  #looked = false
  #stopped = false
  #lastBeat = 0
  #lastBeatMs = 0
  #lastBeatCheckMs = 0
  #durableWaiters: { seq: number; resolve: () => void; reject: (error: CdpError) => void }[] = []

  constructor(options: ProtectedVmOptions) {
    this.vmId = options.vmId
    this.#options = options
    this.#log = options.log.child({ vmId: options.vmId })
    this.#memory = new VmMemoryFile(options.settings.stateDirectory, options.vmId)
    this.#nowUnixMs = options.nowUnixMs ?? Date.now
    this.#state = { is: 'detached', why: 'the VM has not been looked for yet', sinceUnixMs: this.#nowUnixMs() }
  }

  get state(): VmState {
    return this.#state
  }

  get stats(): CaptureStats | undefined {
    return this.#stats
  }

  /** The worker has shown no sign of life for a while. It is ended soon; if that does not help, the watchdog ends the plugin. */
  get workerHangs(): boolean {
    return this.#worker !== undefined && !this.#worker.exited && this.#lastBeat !== -1 && performance.now() - this.#lastBeatMs > SUSPICIOUS_MS
  }

  get disks(): readonly DiskEntry[] {
    return this.#workerDisks
  }

  /** The worker, while what it captures is complete and in step. */
  get streamingWorker(): CaptureWorker | undefined {
    return this.#state.is === 'streaming' ? this.#worker : undefined
  }

  start(): void {
    this.#timers.push(
      setInterval(() => void this.#poll(), POLL_MS),
      setInterval(() => this.#watchBeat(), BEAT_CHECK_MS),
      setInterval(() => void this.#prove(), this.#options.settings.proofEveryMs),
    )
    void this.#poll()
  }

  /** Ends protection. Bitmaps stay if it will go on later (restart, upgrade), else nothing of ours is left in QEMU. */
  async stop(keepBitmaps: boolean): Promise<void> {
    if (this.#stopped) return
    this.#stopped = true
    for (const timer of this.#timers) clearInterval(timer)
    clearTimeout(this.#retry)
    this.#watchingTargets = false
    this.#attachNumber++
    this.#rejectWaiters('protection ends')
    if (this.#state.is !== 'streaming') await this.#letGo('protection ends')
    await this.#work
    this.#dispatch({ on: 'stop', why: 'protection was ended' })
    if (this.#running !== undefined) {
      await takeAway(this.#running, this.#readSocketPath(), keepBitmaps).catch((error: unknown) => {
        this.#log.error('capture could not be taken out of QEMU', { error: errorMessage(error) })
      })
    }
    if (this.#worker !== undefined && !this.#worker.exited) {
      await this.#worker.ask('end', { deadlineMs: END_DEADLINE_MS }).catch((error: unknown) => this.#log.warn('not all of the captured data reached the agent', { error: errorMessage(error) }))
      await this.#worker[Symbol.asyncDispose]()
    }
    if (!keepBitmaps) await this.#memory.forget()
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
        this.#enqueue(() => this.#attach(attachNumber, effect.why))
        return
      }
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
  #supersede(why: string): void {
    this.#watchingTargets = false
    this.#attachNumber++
    this.#rejectWaiters(why)
    void this.#letGo(why)
  }

  async #letGo(why: string): Promise<void> {
    const worker = this.#worker
    if (worker === undefined || worker.exited) return
    await worker.ask('letGo', { why }).catch((error: unknown) => this.#log.warn('the worker did not let go', { error: errorMessage(error) }))
  }

  #enqueue(work: () => Promise<void>): void {
    this.#work = this.#work.then(async () => {
      if (this.#stopped) return
      await work().catch((error: unknown) => this.#log.error('unexpected failure', { error: errorMessage(error) }))
    })
  }

  async #poll(): Promise<void> {
    if (this.#polling || this.#stopped) return
    this.#polling = true
    try {
      const running = await findRunningVm(this.#options.settings.paths, this.vmId)
      if (this.#stopped || (this.#looked && running?.instance === this.#running?.instance)) return
      const why = running === undefined ? undefined : await this.#whyMet(running)
      if (this.#stopped) return
      this.#looked = true
      this.#running = running
      this.#dispatch(running === undefined ? { on: 'vmStopped' } : { on: 'vmStarted', why })
    } catch (error) {
      this.#log.warn('the VM could not be looked for', { error: errorMessage(error) })
    } finally {
      this.#polling = false
    }
  }

  /** Met at the first look with a memory of this very QEMU: it was protected before, by an earlier life of the plugin. */
  async #whyMet(running: RunningVm): Promise<string> {
    if (this.#looked) return 'the VM was started'
    return (await this.#memory.read(running.instance)) === undefined ? 'the VM runs' : 'the plugin was started again'
  }

  async #attach(attachNumber: number, why: string): Promise<void> {
    const vm = this.#running
    if (vm === undefined || attachNumber !== this.#attachNumber) return
    const superseded = (): boolean => attachNumber !== this.#attachNumber
    try {
      const disks = await meetVm(vm, this.#readSocketPath())
      const worker = await this.#workerFor(disks)
      const config = await readVmConfig(this.#options.settings.paths, this.vmId)
      if (superseded()) return
      const welcome = await worker.ask('open', { reason: why, epoch: { reason: why, ...(config === undefined ? {} : { config }) } })
      if (superseded()) return
      // Figures from before speak of another stream.
      this.#stats = undefined
      const context: AttachContext = {
        vm, worker, memory: this.#memory, log: this.#log, targetPath: this.#targetPath(), readSocketPath: this.#readSocketPath(),
        ...(this.#options.settings.existingNbdServers[String(this.vmId)] === undefined ? {} : { existingServerPath: this.#options.settings.existingNbdServers[String(this.vmId)] }),
      }
      const { memory, bitmapsWereThere } = await attachJobs(context, disks)
      const lost = disks.find(({ key }) => (this.#openTargets.get(key) ?? 0) < 1)
      if (lost !== undefined) throw new CdpError('CAPTURE_ATTACH', `QEMU let go of ${lost.key} at once`)
      if (superseded()) throw new CdpError('ABORTED', 'the VM changed while capture was attached')
      this.#watchingTargets = true
      this.#proofs = new Map(disks.map(({ key }) => [key, new CounterProof(IN_FLIGHT_BYTES)]))
      const plan = planSync(welcome, memory, bitmapsWereThere, why)
      if (!plan.fromBitmaps) {
        // What an earlier QEMU process had copied counts no more; the agent has to know that before our memory says that a copy began.
        if (Object.values(welcome.syncProgress).some((bytes) => bytes > 0)) await this.#durable((await worker.ask('restartCopy', {})).lastSeq)
        await this.#memory.write(vm.instance, 'copying')
      }
      if (superseded()) return
      this.#dispatch({ on: 'syncBegan', kind: plan.kind, why: plan.why, totalBytes: 0 })
      const lastSeq = await runSync(context, disks, this.#workerDisks, plan, this.#options.settings.syncRateBytesPerSec)
      if (superseded()) return
      await this.#durable(lastSeq)
      if (superseded()) return
      await retireBitmaps(context, disks)
      this.#retryMs = RETRY_FIRST_MS
      this.#dispatch({ on: 'inStep', why: `${plan.kind} sync complete` })
    } catch (error) {
      if (superseded()) return
      const message = errorMessage(error)
      this.#log.warn('protection did not come into step', { error: message })
      if (this.#watchingTargets) {
        this.#dispatch({ on: 'syncFailed', why: message })
      } else {
        const bitmapRecords = (await this.#memory.read(vm.instance).catch(() => undefined)) !== undefined
        if (superseded()) return
        this.#dispatch({ on: 'attachFailed', why: message, bitmapRecords })
      }
    }
  }

  async #cleanUp(): Promise<void> {
    const vm = this.#running
    await this.#letGo(this.#state.why)
    if (vm === undefined || this.#worker === undefined) return
    await takeAway(vm, this.#readSocketPath(), true).catch((error: unknown) => {
      this.#log.warn('what is left of capture in QEMU will be taken away with the next attach', { error: errorMessage(error) })
    })
  }

  async #workerFor(disks: readonly QemuDisk[]): Promise<CaptureWorker> {
    const entries = toDiskEntries(disks)
    if (entries.length === 0) throw new CdpError('NOT_FOUND', `VM ${this.vmId} has no disk that can be protected`, { hint: 'Give it a writable disk on scsi, virtio, sata or ide.' })
    const same = JSON.stringify(entries) === JSON.stringify(this.#workerDisks)
    if (this.#worker !== undefined && !this.#worker.exited && same) return this.#worker
    const old = this.#worker
    this.#worker = undefined
    await old?.[Symbol.asyncDispose]()
    this.#openTargets = new Map()
    this.#workerDisks = entries
    const { settings, vpg, vms, agent, groupClock } = this.#options
    const worker: CaptureWorker = await CaptureWorker.start({
      vm: String(this.vmId), vpg, vms, agent, groupClock, disks: entries, targetPath: this.#targetPath(), budgetBytes: settings.memoryBytesPerVm,
      lingerMs: settings.lingerMs, slowAck: settings.slowAck,
      onEvent: (event) => this.#onWorkerEvent(event),
      onExit: (why) => {
        if (this.#worker !== worker) return
        this.#rejectWaiters(why)
        if (!this.#stopped) this.#dispatch({ on: 'captureLost', why: `the capture worker ended: ${why}` })
      },
    })
    this.#worker = worker
    this.#lastBeat = -1
    return worker
  }

  #onWorkerEvent(event: CaptureEvent): void {
    switch (event.is) {
      case 'target': {
        const { key, state, why } = event
        this.#openTargets.set(key, (this.#openTargets.get(key) ?? 0) + (state === 'opened' ? 1 : -1))
        if (state === 'closed' && this.#watchingTargets && (this.#openTargets.get(key) ?? 0) < 1) this.#dispatch({ on: 'captureLost', why: `QEMU ended the connection of ${key} (${why})` })
        return
      }
      case 'letGo':
        return this.#dispatch({ on: 'captureLost', why: event.why })
      case 'link':
        this.#log.info(event.up ? 'stream to the agent is up' : 'stream to the agent is down', { why: event.why })
        return
      case 'sync':
        return this.#dispatch({ on: 'syncAdvanced', doneBytes: event.doneBytes, totalBytes: event.totalBytes })
      case 'news':
        return this.#options.onNews(event.news)
      case 'stats':
        this.#stats = event.stats
        this.#resolveDurable(event.stats.durableSeq)
        return
    }
  }

  /** Resolves when the agent holds everything up to `seq` durably; rejects when capture is lost before. */
  async #durable(seq: number): Promise<void> {
    await new Promise<void>((resolve, reject) => {
      this.#durableWaiters.push({ seq, resolve, reject })
      this.#resolveDurable(this.#stats?.durableSeq ?? 0)
    })
  }

  #resolveDurable(durableSeq: number): void {
    for (const waiter of this.#durableWaiters) if (durableSeq >= waiter.seq) waiter.resolve()
    this.#durableWaiters = this.#durableWaiters.filter(({ seq }) => seq > durableSeq)
  }

  #rejectWaiters(why: string): void {
    for (const { reject } of this.#durableWaiters) reject(new CdpError('CLOSED', why))
    this.#durableWaiters = []
  }

  /** A worker that hangs would hang the guest: it is ended, QEMU lets go. (The watchdog process does the same to the whole plugin.) */
  #watchBeat(): void {
    const worker = this.#worker
    if (worker === undefined || worker.exited) return
    const nowMs = performance.now()
    // Who was held up himself (SIGSTOP, a suspended host) cannot tell whether the worker was.
    const heldUp = nowMs - this.#lastBeatCheckMs > HUNG_MS / 2
    this.#lastBeatCheckMs = nowMs
    if (worker.beat !== this.#lastBeat || heldUp) {
      this.#lastBeat = worker.beat
      this.#lastBeatMs = nowMs
    } else if (nowMs - this.#lastBeatMs > HUNG_MS) {
      this.#log.error('the capture worker hangs and is ended')
      void worker.kill('it did not answer for 1 s')
    }
  }

  /** Compares QEMU's written bytes with the captured ones; checkpoints are proved by it, an orphaned job is found by it. */
  async #prove(): Promise<void> {
    const worker = this.streamingWorker
    const vm = this.#running
    if (worker === undefined || vm === undefined || this.#proofBusy) return
    this.#proofBusy = true
    try {
      const before = await worker.ask('captured', {})
      const counters = await lookAtCounters(vm)
      const after = await worker.ask('captured', {})
      if (this.streamingWorker !== worker) return
      const disks: Record<string, { writtenBytes: number; capturedBytes: number }> = {}
      let missed: string | undefined
      for (const [key, proof] of this.#proofs) {
        const counter = counters.get(key)
        if (counter === undefined) continue
        const capturedAfterBytes = after.bytes[key]
        const verdict = proof.look({ capturedBeforeBytes: before.bytes[key], capturedAfterBytes, writtenBytes: counter.wrBytes, failedOperations: counter.failedWrOperations })
        disks[key] = { writtenBytes: counter.wrBytes, capturedBytes: capturedAfterBytes }
        if (!verdict.ok) missed = `${key}: ${verdict.missedBytes} bytes of the guest's writes were not captured`
        else if (!counter.onPath) missed = `${key}: the guest's writes do not pass capture any more`
      }
      // What came after the question is not proved by its answer; but it is suspect, up to the moment in which no cut is made any more.
      const marked = worker.ask('proof', { mark: { ok: missed === undefined, atUnixMs: this.#nowUnixMs(), disks }, ...(missed === undefined ? { upToSeq: before.seq } : {}) })
      if (missed !== undefined) this.#dispatch({ on: 'captureLost', why: missed })
      await marked
    } catch (error) {
      this.#log.warn('the counters of the VM could not be compared', { error: errorMessage(error) })
    } finally {
      this.#proofBusy = false
    }
  }
}
