import { createHash } from 'node:crypto'
import { join } from 'node:path'
import { errorCode } from '../../core/errors/index.ts'
import type { ClientTls } from '../../core/pki/index.ts'
import { readJsonFile, removeFile, writeJsonFile } from '../../core/files/index.ts'

/**
 * What the plugin has to know of a VM after a crash, written before it acts. `instance` is the QEMU process whose dirty bitmaps it speaks of.
 * - `attaching`: something of ours may be half done in QEMU.
 * - `copying`: the bitmaps record since the beginning of a first, full or delta copy that has not come to its end. `progress`, by disk number: a delta copy
 *   has everything below at the agent durably, as it was before the bitmaps' extents were written.
 * - `covered`: everything that is not in the bitmaps is durable at the agent. `disks`: of these, by key, below that many
 *   bytes; of all if it is absent.
 */
export type VmMemory = {
  format: 1
  instance: string
  bitmaps: 'attaching' | 'copying' | 'covered'
  progress?: Record<string, number>
  disks?: Record<string, number>
  /** Of which recovery site all of this speaks: it held everything up to `durableSeq`. One that holds less has lost something, and no bitmap says what. */
  agent?: AgentClaim
}
type AgentClaim = { id: string; durableSeq: number }

const PROGRESS_EVERY_MS = 2_000

/** A recovery site by its certificate authority: that is made once in its life. */
export const agentIdOf = ({ tls }: { tls: Pick<ClientTls, 'authorityPem'> }): string => createHash('sha256').update(tls.authorityPem).digest('hex').slice(0, 16)

export class VmMemoryFile {
  readonly #path: string
  readonly #agentId: string
  #last: VmMemory | undefined
  #progressMs = -Infinity
  #writing: Promise<void> = Promise.resolve()

  /** @param agentId of the recovery site that is protected to now */
  constructor(stateDirectory: string, vmId: number, agentId: string) {
    this.#path = join(stateDirectory, `vm-${vmId}.json`)
    this.#agentId = agentId
  }

  /** What is known of that QEMU process; undefined if nothing is: its bitmaps then prove nothing. What is known of another recovery site says no more of them either. */
  async read(instance: string): Promise<VmMemory | undefined> {
    const memory = await this.#stored()
    if (memory === undefined || memory.instance !== instance) return undefined
    return memory.agent?.id === this.#agentId ? memory : { format: 1, instance, bitmaps: 'attaching' }
  }

  async #stored(): Promise<VmMemory | undefined> {
    const memory = (await readJsonFile(this.#path).catch((error: unknown) => {
      // Not readable is not known: a full sync is the answer, not a VM without protection.
      if (errorCode(error) === 'FORMAT') return undefined
      throw error
    })) as VmMemory | undefined
    return memory?.format === 1 ? memory : undefined
  }

  /** @param durableSeq the recovery site holds everything up to it */
  async write(instance: string, bitmaps: VmMemory['bitmaps'], disks?: Record<string, number>, durableSeq = 0): Promise<void> {
    await this.#load()
    const known = this.#last
    await this.#write({ format: 1, instance, bitmaps, ...(disks === undefined ? {} : { disks }), agent: this.#claim(known, durableSeq) })
  }

  /** What another node's memory said of the bitmaps that came with the VM: they prove nothing of another recovery site. */
  async takeOver(instance: string, { coveredBytes, agent }: { coveredBytes: Readonly<Record<string, number>>; agent: AgentClaim }): Promise<void> {
    await this.#load()
    if (agent.id !== this.#agentId || Object.keys(coveredBytes).length === 0) return this.write(instance, 'attaching')
    await this.write(instance, 'covered', { ...coveredBytes }, agent.durableSeq)
  }

  /** The recovery site holds everything up to a sequence; what bitmaps said of it may go once this is kept. */
  async noteDurable(instance: string, durableSeq: number): Promise<void> {
    await this.#load()
    const known = this.#last
    if (known?.instance !== instance || known.agent?.id !== this.#agentId) return
    await this.#write({ ...known, agent: this.#claim(known, durableSeq) })
  }

  /** The recovery site holds everything up to `durableSeq`, as it says itself. True if that is less than it held: then bitmaps prove nothing, which is kept. */
  async losesTo(instance: string, durableSeq: number): Promise<boolean> {
    await this.#load()
    const { agent } = this.#last ?? {}
    if (agent?.id !== this.#agentId || durableSeq >= agent.durableSeq) return false
    await this.distrust(instance, durableSeq)
    return true
  }

  /** Bitmaps prove nothing any more, whatever becomes of this attach: the recovery site holds no more than what is up to `durableSeq`. */
  async distrust(instance: string, durableSeq: number): Promise<void> {
    await this.#write({ format: 1, instance, bitmaps: 'attaching', agent: { id: this.#agentId, durableSeq } })
  }

  /** A delta copy has come so far, durably, by that sequence. Kept every few seconds; what was not kept is compared again. */
  async noteProgress(instance: string, progress: Record<string, number>, durableSeq = 0): Promise<void> {
    await this.#load()
    const known = this.#last
    if (known?.bitmaps !== 'copying' || known.instance !== instance || known.agent?.id !== this.#agentId) return
    const merged = { ...known, progress: { ...known.progress, ...progress }, agent: this.#claim(known, durableSeq) }
    this.#last = merged
    if (performance.now() - this.#progressMs < PROGRESS_EVERY_MS) return
    this.#progressMs = performance.now()
    await this.#write(merged)
  }

  async forget(): Promise<void> {
    this.#last = undefined
    await this.#writing
    await removeFile(this.#path)
  }

  /** From then on #last is what was meant last. Nothing may wait between a look at it and the write that builds on that. */
  async #load(): Promise<void> {
    if (this.#last !== undefined) return
    const stored = await this.#stored()
    this.#last ??= stored
  }

  /** What is claimed of the present recovery site only grows. */
  #claim(known: VmMemory | undefined, durableSeq: number): AgentClaim {
    const agent = known?.agent
    return { id: this.#agentId, durableSeq: Math.max(durableSeq, agent?.id === this.#agentId ? agent.durableSeq : 0) }
  }

  /** One after the other: what was meant last is what stays. */
  async #write(memory: VmMemory): Promise<void> {
    this.#last = memory
    this.#writing = this.#writing.catch(() => undefined).then(() => writeJsonFile(this.#path, memory))
    await this.#writing
  }
}
