import { describe, expect, test } from '@jest/globals'
import { silentLogger } from '../../core/log/index.ts'
import type { CaptureWorker } from '../capture/index.ts'
import type { DiskCounters, VmLook } from '../qemu/index.ts'
import { BitmapRotation } from './bitmap-rotation.ts'
import { CaptureProver } from './capture-prover.ts'
import type { Finding } from './capture-prover.ts'

const BLOCK = 512

/**
 * A guest's writes on their way: to the source (the bit is set), to capture (it gets its sequence, and is complete for the guest), to the agent's disk.
 * Between any two steps of the rotation some of them go a step further.
 */
class Model {
  /** Bit set, not arrived yet. */
  pending: number[] = []
  /** By sequence. */
  arrived: number[] = []
  durableSeq = 0
  current = new Set<number>()
  still = new Set<number>()
  failed = 0
  retirements = 0
  readonly #random: (below: number) => number
  #block = 0
  #waiters: { seq: number; resolve: () => void }[] = []

  constructor(random: (below: number) => number) {
    this.#random = random
  }

  step(): void {
    for (let n = this.#random(8); n > 0; n--) {
      const what = this.#random(3)
      if (what === 0 && this.pending.length < 16) {
        this.pending.push(++this.#block)
        this.current.add(this.#block)
      } else if (what === 1) this.#arrive()
      else if (this.durableSeq < this.arrived.length) this.#durable()
    }
    // What the promise is: whatever is not durable, a bitmap knows of.
    for (const block of [...this.pending, ...this.arrived.slice(this.durableSeq)]) {
      if (!this.current.has(block) && !this.still.has(block)) throw new Error(`block ${block} is in no bitmap and not durable`)
    }
  }

  get worker(): Pick<CaptureWorker, 'ask'> {
    return {
      ask: async (name: string) => {
        this.step()
        return (name === 'captured' ? { seq: this.arrived.length, bytes: { scsi0: this.arrived.length * BLOCK } } : {})
      },
    }
  }

  async rotate(): Promise<VmLook> {
    this.step()
    this.still = new Set([...this.still, ...this.current])
    this.current = new Set()
    this.step()
    while (this.pending.length > 0) this.#arrive()
    const wrBytes = this.arrived.length * BLOCK
    this.step()
    const counters = { key: 'scsi0', wrBytes, failedWrOperations: this.failed, onPath: true } as DiskCounters
    return { counters: new Map([['scsi0', counters]]), sizes: new Map([['scsi0', 1 << 20]]), drained: true }
  }

  async retire(): Promise<void> {
    this.step()
    this.still = new Set()
    this.retirements++
    this.step()
  }

  async durable(seq: number): Promise<void> {
    this.step()
    if (this.durableSeq >= seq) return
    const waiting = new Promise<void>((resolve) => this.#waiters.push({ seq, resolve }))
    while (this.durableSeq < seq) this.#durable()
    await waiting
    this.step()
  }

  #arrive(): void {
    const block = this.pending.shift()
    if (block !== undefined) this.arrived.push(block)
  }

  #durable(): void {
    this.durableSeq++
    for (const { seq, resolve } of this.#waiters) if (this.durableSeq >= seq) resolve()
  }
}

const rotationOf = (model: Model, options: { superseded?: () => boolean; log?: string[] } = {}): BitmapRotation => {
  const prover = new CaptureProver({ worker: model.worker, disks: [{ disk: 0, key: 'scsi0', sizeBytes: 1 << 20 }], nowUnixMs: () => 1 })
  return new BitmapRotation({
    worker: model.worker, log: silentLogger,
    exclusively: async (work) => (options.superseded?.() === true ? undefined : work()),
    rotate: () => model.rotate(), retire: () => model.retire(), durable: (seq) => model.durable(seq),
    check: async (look) => prover.check(look, (finding: Finding) => options.log?.push(finding.is)),
  }, 0)
}

const randomFrom = (seed: number): ((below: number) => number) => {
  let state = seed
  return (below) => ((state = (Math.imul(state, 1_103_515_245) + 12_345) & 0x7fff_ffff) >> 8) % below
}

describe('BitmapRotation', () => {
  test('whatever is not durable is in a bitmap, at every moment', async () => {
    for (let seed = 1; seed <= 200; seed++) {
      const model = new Model(randomFrom(seed))
      const rotation = rotationOf(model)
      for (let turn = 0; turn < 10; turn++) {
        model.step()
        await rotation.turn()
      }
      if (model.retirements === 0 && model.arrived.length > 0) throw new Error(`seed ${seed}: nothing was retired`)
    }
  })

  test('a write that failed at the source keeps its bit: nothing is retired, and it is told', async () => {
    const model = new Model(randomFrom(5))
    const log: string[] = []
    const rotation = rotationOf(model, { log })
    for (let n = 0; n < 20; n++) model.step()
    await rotation.turn()
    const { retirements } = model
    expect(retirements).toBe(1)
    model.failed = 1
    for (let n = 0; n < 20; n++) model.step()
    await rotation.turn()
    expect([log, model.retirements]).toEqual([['proved', 'lost'], retirements])
    expect(model.still.size).toBeGreaterThan(0)
  })

  test('an attach that is over retires nothing: the bitmaps belong to the next one', async () => {
    const model = new Model(randomFrom(9))
    let calls = 0
    const rotation = rotationOf(model, { superseded: () => calls++ > 0 })
    for (let n = 0; n < 20; n++) model.step()
    await rotation.turn()
    expect([calls, model.retirements]).toEqual([2, 0])
  })
})
