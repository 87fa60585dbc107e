import { randomBytes } from 'node:crypto'
import { CdpError } from '../../core/errors/index.ts'
import type { Logger } from '../../core/log/index.ts'
import type { CheckpointKind, CheckpointMark } from '../../core/record/index.ts'
import type { StateNews } from '../../core/stream/index.ts'
import { GroupClock } from '../capture/index.ts'
import { CheckpointLabels, cutOnOneNode, scheduleCheckpoints } from '../checkpoint/index.ts'
import { ProtectedVm } from './protected-vm.ts'
import type { AgentAddress, ProtectSettings } from './protected-vm.ts'
import type { VmState } from './vm-state.ts'

/** What an operator defines. */
export type VpgDefinition = { name: string; vmIds: number[]; checkpointEveryMs: number }

export type VpgEvent = { level: 'info' | 'warn'; kind: string; message: string; context: Record<string, string | number> }

export type VpgOptions = {
  definition: VpgDefinition
  settings: ProtectSettings
  agent: AgentAddress
  log: Logger
  onEvent: (event: VpgEvent) => void
  nowUnixMs?: () => number
}

/** A virtual protection group on this node: its VMs, the clock they share, and the cutting of checkpoints. */
export class Vpg implements AsyncDisposable {
  readonly definition: VpgDefinition
  readonly vms: readonly ProtectedVm[]
  readonly #log: Logger
  readonly #clock = new GroupClock()
  readonly #labels = new CheckpointLabels()
  readonly #nowUnixMs: () => number
  readonly #onEvent: (event: VpgEvent) => void
  #schedule: Disposable | undefined
  #abandonedCuts = 0
  #lastValid: { id: string; atUnixMs: number } | undefined

  constructor({ definition, settings, agent, log, onEvent, nowUnixMs }: VpgOptions) {
    this.definition = definition
    this.#log = log.child({ vpg: definition.name })
    this.#nowUnixMs = nowUnixMs ?? Date.now
    this.#onEvent = onEvent
    const vms = definition.vmIds.map(String)
    this.vms = definition.vmIds.map((vmId) => new ProtectedVm({
      vmId, vpg: definition.name, vms, settings, agent, groupClock: this.#clock.buffer, log: this.#log, nowUnixMs: this.#nowUnixMs,
      onChange: (id, state) => this.#onChange(id, state),
      onNews: (news) => this.#onNews(news),
    }))
  }

  /** The newest checkpoint that the agent called valid. */
  get lastValid(): { id: string; atUnixMs: number } | undefined {
    return this.#lastValid
  }

  /** Cuts that were begun and did not become a checkpoint. */
  get abandonedCuts(): number {
    return this.#abandonedCuts
  }

  start(): void {
    this.#schedule = scheduleCheckpoints(this.definition.checkpointEveryMs, this.#log, async () => {
      if (this.#workers() !== undefined) await this.cut('automatic')
    })
    for (const vm of this.vms) vm.start()
  }

  /**
   * Cuts a checkpoint now.
   * @returns its id and label; it is valid when the agent says so
   * @throws CdpError CONFLICT when a VM of the group is not in step
   */
  async cut(kind: CheckpointKind, tag?: string): Promise<{ id: string; atUnixMs: number }> {
    const workers = this.#workers()
    if (workers === undefined) {
      const behind = this.vms.filter(({ state }) => state.is !== 'streaming').map(({ vmId, state }) => `VM ${vmId} is ${state.is} (${state.why})`)
      throw new CdpError('CONFLICT', `no checkpoint of ${this.definition.name} can be cut: ${behind.join('; ')}`, { retry: true, hint: 'Wait until all VMs of the group are streaming.' })
    }
    const atUnixMs = this.#labels.next(this.#nowUnixMs())
    const id = `${atUnixMs.toString(36)}-${randomBytes(4).toString('hex')}`
    const mark: CheckpointMark = { id, vpg: this.definition.name, vms: this.definition.vmIds.map(String), atUnixMs, kind, ...(tag === undefined ? {} : { tag }) }
    const outcome = await cutOnOneNode(this.#clock, workers, mark)
    if (!outcome.ok) {
      this.#abandonedCuts++
      this.#onEvent({ level: 'info', kind: 'cut.abandoned', message: `a checkpoint of ${this.definition.name} was abandoned: ${outcome.why}`, context: { vpg: this.definition.name } })
      if (kind !== 'automatic') throw new CdpError('CONFLICT', `the checkpoint was abandoned: ${outcome.why}`, { retry: true, hint: 'Try again.' })
    }
    return { id, atUnixMs }
  }

  async stop(keepBitmaps: boolean): Promise<void> {
    this.#schedule?.[Symbol.dispose]()
    this.#schedule = undefined
    await Promise.all(this.vms.map((vm) => vm.stop(keepBitmaps)))
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.stop(true)
  }

  #workers() {
    const workers = this.vms.map(({ streamingWorker }) => streamingWorker)
    return workers.every((worker) => worker !== undefined) ? workers : undefined
  }

  #onChange(vmId: number, state: VmState): void {
    this.#onEvent({
      level: state.is === 'tracking' ? 'warn' : 'info',
      kind: `vm.${state.is}`,
      message: `VM ${vmId} is ${state.is}: ${state.why}`,
      context: { vpg: this.definition.name, vmId },
    })
  }

  #onNews({ validCheckpoint }: StateNews): void {
    if (validCheckpoint !== undefined && validCheckpoint.atUnixMs > (this.#lastValid?.atUnixMs ?? 0)) this.#lastValid = validCheckpoint
  }
}
