import { rm } from 'node:fs/promises'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import type { GroupKeeperOptions } from './group-keeper.ts'
import { GroupKeeper } from './group-keeper.ts'
import { groupStatePath } from './group-state.ts'
import type { RetentionPolicy } from './policy.ts'
import { isSyncPaused } from './plan.ts'
import { reserveOf } from './policy.ts'

export type Space = { freeBytes: number; totalBytes: number; reserveBytes: number }

export type RetentionKeeperOptions = Omit<GroupKeeperOptions, 'siteId' | 'vpg' | 'policy' | 'storeOf'> & {
  storeOf: (siteId: string, vm: string) => ReturnType<GroupKeeperOptions['storeOf']>
  policyOf: (vpg: string) => RetentionPolicy
  /** Of the file system that the journals are on. */
  space: () => Promise<{ freeBytes: number; totalBytes: number }>
  reserve: { reserveBytes?: number | undefined; reservePercent?: number | undefined }
  /** From the end of a round to the next. */
  everyMs?: number
}

const EVERY_MS = 5000

/** Keeps the history of every group as its policy says: rounds over all groups, one after the other, one step of promotion each. */
export class RetentionKeeper implements AsyncDisposable {
  readonly #options: RetentionKeeperOptions
  readonly #groups = new Map<string, GroupKeeper>()
  /** By site and VM. */
  readonly #policies = new Map<string, RetentionPolicy>()
  readonly #ending = new AbortController()
  #space: Space = { freeBytes: 0, totalBytes: 0, reserveBytes: 0 }
  #timer: NodeJS.Timeout | undefined
  #round: Promise<void> | undefined

  constructor(options: RetentionKeeperOptions) {
    this.#options = options
  }

  get space(): Space {
    return this.#space
  }

  /** Reads the state of every group, before any recovery point is opened; then rounds begin. */
  async start(): Promise<void> {
    for (const { siteId, name } of this.#options.catalogue.listVpgs()) {
      // The rounds try again.
      await this.#group(siteId, name).catch((error: unknown) => this.#options.log.error('the state of retention cannot be read', { vpg: name, error: errorMessage(error) }))
    }
    this.#later()
  }

  group(siteId: string, vpg: string): GroupKeeper | undefined {
    return this.#groups.get(`${siteId}/${vpg}`)
  }

  /** For VmStoreOptions.mayGrow: a VM's journal takes nothing more at its hard stop, and nothing of a sync that is to pause at the limit. */
  mayGrow(siteId: string, vm: string, journalBytes: number): CdpError | undefined {
    const policy = this.#policies.get(`${siteId}/${vm}`)
    if (policy === undefined) return undefined
    const { hardStopBytes = Infinity, journalLimitBytes } = policy
    if (isSyncPaused(policy, journalBytes, 1) && this.#options.catalogue.syncSinceSeq(siteId, vm) !== undefined) {
      return new CdpError('IO', `a sync of VM ${vm} would not fit the limit of its journal, and is paused`, {
        retry: true, hint: 'Raise the limit, or choose otherwise with "pvecdp retention set": it goes on by itself then.', context: { vm, condition: 'full', journalLimitBytes },
      })
    }
    if (journalBytes < hardStopBytes) return undefined
    return new CdpError('IO', `the journal of VM ${vm} is at its hard stop`, {
      retry: true, hint: 'See "pvecdp retention show" for what holds its history: close recovery points, or raise the limits.', context: { vm, condition: 'full', hardStopBytes },
    })
  }

  /** The group is gone: one that comes under its name begins anew. */
  async forget(siteId: string, vpg: string): Promise<void> {
    await this.#round
    this.#groups.delete(`${siteId}/${vpg}`)
    await rm(groupStatePath(this.#options.directory, siteId, vpg), { force: true })
  }

  /** The replica of a VM goes: one that comes in its place counts its sequences from the start. @throws Node's error */
  async forgetVm(siteId: string, vm: string): Promise<void> {
    for (const group of this.#groups.values()) if (group.siteId === siteId) await group.forgetVm(vm)
  }

  /** One round over all groups; a second call while one is under way waits for that one. */
  async round(): Promise<void> {
    this.#round ??= this.#runRound().finally(() => (this.#round = undefined))
    await this.#round
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#ending.abort(new CdpError('ABORTED', 'the agent stops'))
    clearTimeout(this.#timer)
    await this.#round
  }

  async #runRound(): Promise<void> {
    const { catalogue, space, reserve, storeOf, log } = this.#options
    const vpgs = catalogue.listVpgs()
    const bytesOf = ({ siteId, vms }: { siteId: string; vms: string[] }): number => vms.reduce((sum, vm) => sum + (storeOf(siteId, vm)?.journalBytes ?? 0), 0)
    try {
      const { freeBytes, totalBytes } = await space()
      this.#space = { freeBytes, totalBytes, reserveBytes: reserveOf(totalBytes, reserve) }
    } catch (error) {
      log.warn('free space below the journals is not known', { error: errorMessage(error) })
    }
    const shortBytes = Math.max(0, this.#space.reserveBytes - this.#space.freeBytes)
    const allBytes = vpgs.reduce((sum, vpg) => sum + bytesOf(vpg), 0)
    for (const vpg of vpgs) {
      if (this.#ending.signal.aborted) return
      try {
        const group = await this.#group(vpg.siteId, vpg.name)
        for (const vm of vpg.vms) this.#policies.set(`${vpg.siteId}/${vm}`, group.policy)
        await group.turn(vpg.vms, allBytes === 0 ? 0 : (shortBytes * bytesOf(vpg)) / allBytes, this.#ending.signal)
      } catch (error) {
        log.error('retention of a group failed', { vpg: vpg.name, error: errorMessage(error) })
      }
    }
  }

  async #group(siteId: string, vpg: string): Promise<GroupKeeper> {
    const key = `${siteId}/${vpg}`
    let group = this.#groups.get(key)
    if (group === undefined) {
      const { storeOf, policyOf } = this.#options
      group = new GroupKeeper({ ...this.#options, siteId, vpg, policy: policyOf(vpg), storeOf: (vm) => storeOf(siteId, vm) })
      await group.load()
      this.#groups.set(key, group)
    }
    return group
  }

  #later(): void {
    this.#timer = setTimeout(() => void this.round().finally(() => {
      if (!this.#ending.signal.aborted) this.#later()
    }), this.#options.everyMs ?? EVERY_MS)
  }
}
