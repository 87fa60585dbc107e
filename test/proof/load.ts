import { setImmediate as nextTurn, setTimeout as delay } from 'node:timers/promises'
import { KNOWLEDGE_WINDOW, STAMP_BYTES, stampWrite, type WriteHistory } from '../../agent/proof/index.ts'
import { NbdClient } from '../../core/nbd/index.ts'
import { Random } from '../kit/random.ts'
import { REGION_SECTORS, type ProofDisk } from './rig.ts'

/** Four of each kind below. */
export const WRITER_COUNT = 12
const CONNECTIONS_PER_DISK = 2
const SIZES_SECTORS = [1, 2, 7, 8, 8, 8, 8, 8, 16, 16, 33, 64, 128]
/** Where about a third of the writes go: written again and again. */
const HOT_SECTORS = 96
const PACE_MS = 5
const HEAVY_SECTORS = 128

export type LoadOptions = { history: WriteHistory; disks: readonly ProofDisk[]; seed: number; writesPerSec: number }
export type LoadFigures = { writes: number; flushes: number; writtenBytes: number; slowestMs: number }

/**
 * Writers without an OS, all in this process, through QEMU's own NBD server and the drives' root nodes, over all disks of all VMs:
 *
 * - *chains*: one write under way; the next one goes to another disk, mostly of another VM;
 * - *streams*: up to 8 under way anywhere, in no order;
 * - *transactions*: some concurrent writes to one disk, when all are acknowledged sometimes a flush, then one FUA write on another VM.
 */
export class Load {
  readonly figures: LoadFigures = { writes: 0, flushes: 0, writtenBytes: 0, slowestMs: 0 }
  readonly #options: LoadOptions
  readonly #clients: NbdClient[][]
  readonly #filling: Buffer
  readonly #ending = new AbortController()
  #tokens = 0
  #sprintUntilMs = 0
  #heavyDisk = 0
  #waiting: (() => void)[] = []
  #underWay = 0
  #pause: Promise<unknown> | undefined
  #onQuiet: (() => void) | undefined
  #running: Promise<unknown> = Promise.resolve()
  #failure: { error: unknown } | undefined

  private constructor(options: LoadOptions, clients: NbdClient[][]) {
    this.#options = options
    this.#clients = clients
    const random = new Random(options.seed)
    this.#filling = Buffer.alloc(1 << 20)
    // One half does not compress, the other does.
    for (let at = 0; at < this.#filling.length / 2; at += 4) this.#filling.writeUInt32LE(random.u32(), at)
  }

  static async start(options: LoadOptions): Promise<Load> {
    await using stack = new AsyncDisposableStack()
    const clients: NbdClient[][] = []
    for (const { socketPath, key } of options.disks) {
      const ofDisk: NbdClient[] = []
      for (let n = 0; n < CONNECTIONS_PER_DISK; n++) ofDisk.push(stack.use(await NbdClient.connect({ path: socketPath }, { exportName: key })))
      clients.push(ofDisk)
    }
    const load = new Load(options, clients)
    stack.move()
    load.#running = load.#run()
    return load
  }

  /**
   * For so long all writers go as fast as they can, and the streams write large blocks to one VM. A wrong cut shows only if dependent writes
   * fall between what it does to one VM and to the other: so they lie dense, and one VM's worker is busier than the other's.
   */
  sprint(forMs: number, heavyDisk: number): void {
    this.#sprintUntilMs = performance.now() + forMs
    this.#heavyDisk = heavyDisk
    for (const resolve of this.#waiting.splice(0)) resolve()
  }

  /** No write is under way while `work` runs; then the writers go on. */
  async whileQuiet(work: () => Promise<void>): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>()
    this.#pause = promise
    try {
      if (this.#underWay > 0) await new Promise<void>((quiet) => (this.#onQuiet = quiet))
      await work()
    } finally {
      this.#pause = undefined
      resolve()
    }
  }

  /** Throws what stopped a writer, if one was. */
  check(): void {
    if (this.#failure !== undefined) throw this.#failure.error
  }

  /** Ends all writers after their last acknowledgement. */
  async stop(): Promise<void> {
    this.#ending.abort()
    await this.#running
    this.check()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#ending.abort()
    await this.#running
    for (const client of this.#clients.flat()) await client[Symbol.asyncDispose]()
  }

  get #sprinting(): boolean {
    return performance.now() < this.#sprintUntilMs
  }

  get #over(): boolean {
    return this.#ending.signal.aborted
  }

  async #run(): Promise<void> {
    const pace = this.#pace()
    const programs = [this.#chain, this.#stream, this.#transactions]
    const writers = Array.from({ length: WRITER_COUNT }, async (_, writer) => {
      try {
        await programs[writer % programs.length].call(this, writer, new Random(this.#options.seed + 1 + writer))
      } catch (error) {
        this.#failure ??= { error }
        this.#ending.abort()
      }
    })
    await Promise.all([...writers, pace])
  }

  async #chain(writer: number, random: Random): Promise<void> {
    let disk = 0
    while (!this.#over) {
      disk = this.#otherDisk(disk, random)
      await this.#turn()
      await this.#write(writer, disk, random)
    }
  }

  async #stream(writer: number, random: Random): Promise<void> {
    const depth = random.int(2, 9)
    const lanes = Array.from({ length: depth }, async () => {
      while (!this.#over) {
        await this.#turn()
        if (this.#sprinting) await this.#write(writer, this.#heavyDisk, random, { sizeSectors: HEAVY_SECTORS })
        else await this.#write(writer, random.int(0, this.#options.disks.length), random)
        if (random.chance(0.002)) await delay(random.int(1, 30))
      }
    })
    const ended = await Promise.allSettled(lanes)
    for (const lane of ended) if (lane.status === 'rejected') throw lane.reason
  }

  async #transactions(writer: number, random: Random): Promise<void> {
    while (!this.#over) {
      const disk = random.int(0, this.#options.disks.length)
      await this.#turn()
      await Promise.all(Array.from({ length: random.int(1, 7) }, () => this.#write(writer, disk, random)))
      if (random.chance(0.2)) {
        await this.#clients[disk][0].flush()
        this.figures.flushes++
      }
      await this.#write(writer, this.#otherVm(disk, random), random, { fua: true, sizeSectors: 1 })
    }
  }

  async #write(writer: number, disk: number, random: Random, how: { fua?: boolean; sizeSectors?: number } = {}): Promise<void> {
    while (this.#pause !== undefined) await this.#pause
    const { history } = this.#options
    const sectors = how.sizeSectors ?? SIZES_SECTORS[random.int(0, SIZES_SECTORS.length)]
    const firstSector = this.#place(disk, sectors, random)
    // Everything near is being written, or too many of this writer are under way: others first.
    if (firstSector === undefined || !history.hasRoom(writer)) return nextTurn()
    const lengthBytes = sectors * STAMP_BYTES
    const data = Buffer.allocUnsafe(lengthBytes)
    const from = random.int(0, this.#filling.length - lengthBytes)
    this.#filling.copy(data, 0, from, from + lengthBytes)
    const client = this.#clients[disk][random.int(0, CONNECTIONS_PER_DISK)]
    const write = history.submit(writer, disk, firstSector, sectors)
    stampWrite(data, write, history.knowledge)
    const startedAtMs = performance.now()
    this.#underWay++
    try {
      await client.write(firstSector * STAMP_BYTES, data, { fua: how.fua === true })
    } finally {
      if (--this.#underWay === 0) this.#onQuiet?.()
    }
    history.acknowledge(write)
    const tookMs = performance.now() - startedAtMs
    const { figures } = this
    figures.writes++
    figures.writtenBytes += lengthBytes
    this.#tokens--
    if (tookMs > figures.slowestMs) figures.slowestMs = tookMs
  }

  #place(disk: number, sectors: number, random: Random): number | undefined {
    for (let attempt = 0; attempt < 8; attempt++) {
      const end = (random.chance(0.33) && sectors <= HOT_SECTORS ? HOT_SECTORS : REGION_SECTORS) - sectors
      const at = random.int(0, end + 1)
      const firstSector = sectors >= 8 && random.chance(0.8) ? at - (at % 8) : at
      if (this.#options.history.isFree(disk, firstSector, sectors)) return firstSector
    }
    return undefined
  }

  #otherDisk(disk: number, random: Random): number {
    return random.chance(0.7) ? this.#otherVm(disk, random) : (disk + random.int(1, this.#options.disks.length)) % this.#options.disks.length
  }

  #otherVm(disk: number, random: Random): number {
    const { disks } = this.#options
    const others = disks.flatMap(({ vmId }, index) => (vmId === disks[disk].vmId ? [] : [index]))
    return others[random.int(0, others.length)]
  }

  /** Waits until the rate allows one more. */
  async #turn(): Promise<void> {
    if (this.#sprinting || (this.#tokens > 0 && this.#waiting.length === 0)) return
    const { promise, resolve } = Promise.withResolvers<void>()
    this.#waiting.push(resolve)
    return promise
  }

  async #pace(): Promise<void> {
    const perTurn = (this.#options.writesPerSec * PACE_MS) / 1000
    let lastMs = performance.now()
    while (!this.#over) {
      await delay(PACE_MS)
      const nowMs = performance.now()
      this.#tokens = Math.min(perTurn * 4, Math.max(-perTurn * 4, this.#tokens) + ((nowMs - lastMs) * this.#options.writesPerSec) / 1000)
      lastMs = nowMs
      for (let free = Math.min(Math.ceil(this.#tokens), KNOWLEDGE_WINDOW); free > 0; free--) this.#waiting.shift()?.()
    }
    for (const resolve of this.#waiting.splice(0)) resolve()
  }
}
