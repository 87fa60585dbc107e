import { readFile, rename } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { SegmentSealer } from '../../agent/journal/index.ts'
import type { VmStore } from '../../agent/journal/index.ts'
import { buildFrame, DISKS, memoryDirectory, openReadyStore, openStore, seededRandom } from '../../agent/journal/testing.ts'
import type { RecordSpec } from '../../agent/journal/testing.ts'
import { errorCode } from '../../core/errors/index.ts'
import { adaptiveZstd, RecordKind } from '../../core/record/index.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

const HISTORIES = process.env.CDP_ALL === undefined ? 30 : 400
const STEPS = 40

type Held = { firstSeq: number; lastSeq: number; bytes: Buffer }

/** The bytes of every frame in the journal, as the files have them. */
const storedBytes = async (store: VmStore): Promise<Buffer[]> => {
  const frames: Buffer[] = []
  for (const { segmentNumber, path, framesEndBytes } of store.segments) {
    const file = await readFile(path)
    const offsets: number[] = []
    for await (const { frameOffset } of store.recordsOf(segmentNumber)) offsets.push(frameOffset)
    offsets.forEach((offset, at) => frames.push(file.subarray(offset, offsets[at + 1] ?? framesEndBytes)))
  }
  return frames
}

class History {
  readonly held: Held[] = []
  readonly #random: () => number
  readonly #directory: string
  readonly #compress = adaptiveZstd()
  readonly #limits: { segmentBytes: number; segmentRecords: number }
  #store: VmStore
  #epoch = 1

  constructor(directory: string, store: VmStore, random: () => number, limits: { segmentBytes: number; segmentRecords: number }) {
    this.#directory = directory
    this.#store = store
    this.#random = random
    this.#limits = limits
  }

  get #nextSeq(): number {
    return (this.held.at(-1)?.lastSeq ?? 1) + 1
  }

  #below(bound: number): number {
    return Math.floor(this.#random() * bound)
  }

  #frame(firstSeq: number): Held {
    const records: RecordSpec[] = Array.from({ length: 1 + this.#below(12) }, () => {
      const kind = [RecordKind.write, RecordKind.write, RecordKind.zero, RecordKind.discard, RecordKind.sync, RecordKind.syncZero][this.#below(6)]
      return { kind, disk: this.#below(2), offsetBytes: this.#below(4096) * 512, lengthBytes: 512 * (1 + this.#below(16)), fill: this.#below(256) }
    })
    const bytes = buildFrame({ firstSeq, epoch: this.#epoch, records, compress: this.#random() < 0.5 ? this.#compress : undefined })
    return { firstSeq, lastSeq: firstSeq + records.length - 1, bytes }
  }

  #append(): void {
    for (let burst = this.#below(6); burst >= 0; burst--) {
      const frame = this.#frame(this.#nextSeq)
      this.#store.accept(Buffer.from(frame.bytes))
      this.held.push(frame)
    }
  }

  async step(): Promise<void> {
    const dice = this.#random()
    if (dice < 0.5) this.#append()
    else if (dice < 0.58) this.#sendAgain()
    else if (dice < 0.64) this.#refused()
    else if (dice < 0.72) await this.#store.flush()
    else if (dice < 0.78) await this.#attach()
    else if (dice < 0.84) await this.#resume()
    else if (dice < 0.87) expect((await this.#store.verify()).damage).toEqual([])
    else if (dice < 0.9) await this.#fail()
    else await this.#reopen()
  }

  #sendAgain(): void {
    const before = this.#store.receivedSeq
    for (const { bytes } of this.held.slice(-5)) {
      if (bytes.readUInt32LE(28) === this.#epoch) this.#store.accept(Buffer.from(bytes))
    }
    expect(this.#store.receivedSeq).toBe(before)
  }

  #refused(): void {
    expect(() => this.#store.accept(this.#frame(this.#nextSeq + 1).bytes)).toThrow(expect.objectContaining({ code: 'STREAM_PROTOCOL' }))
    const broken = this.#frame(this.#nextSeq).bytes
    broken[this.#below(broken.length)] ^= 1 << this.#below(8)
    expect(() => this.#store.accept(broken)).toThrow()
  }

  async #attach(): Promise<void> {
    const answer = await this.#store.beginEpoch(DISKS)
    expect(answer).toMatchObject({ epoch: this.#epoch + 1, durableSeq: this.#nextSeq - 1 })
    this.#epoch = answer.epoch
  }

  async #resume(): Promise<void> {
    await expect(this.#store.resumeEpoch(this.#epoch)).resolves.toMatchObject({ epoch: this.#epoch, durableSeq: this.#nextSeq - 1 })
  }

  async #reopen(): Promise<void> {
    await this.#store[Symbol.asyncDispose]()
    this.#store = await openStore(this.#directory, sealer, this.#limits)
    expect(this.#store.openReport.tornTail).toBeUndefined()
    expect(this.#store.durableSeq).toBe(this.#nextSeq - 1)
    await this.check()
    await this.#resume()
  }

  /** A segment cannot be made: the store gives up, promises nothing more, and opens again with what it had promised. */
  async #fail(): Promise<void> {
    await this.#store.flush()
    const journal = join(this.#directory, 'journal')
    await this.#store.sealingIdle()
    await rename(journal, `${journal}.away`)
    let tried = 0
    while (this.#store.condition === 'open' && tried++ < 200) {
      try {
        this.#append()
      } catch (error) {
        expect(errorCode(error)).toBe('IO')
      }
      await this.#store.flush()
    }
    expect(this.#store.condition).toBe('failed')
    expect(() => this.#store.accept(this.#frame(this.#nextSeq).bytes)).toThrow(expect.objectContaining({ code: 'IO' }))
    await rename(`${journal}.away`, journal)
    const promised = this.#store.durableSeq
    while (this.#nextSeq - 1 > promised) this.held.pop()
    await this.#reopen()
  }

  async check(): Promise<void> {
    await this.#store.flush()
    const stored = await storedBytes(this.#store)
    expect(stored.length).toBe(this.held.length)
    stored.forEach((bytes, at) => expect(bytes.equals(this.held[at].bytes)).toBe(true))
    for (const segment of this.#store.segments) {
      expect(segment.recordCount === 0 || segment.framesEndBytes <= this.#limits.segmentBytes + 70_000).toBe(true)
    }
    expect(this.#store.damage()).toEqual([])
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#store[Symbol.asyncDispose]()
  }
}

test(`${HISTORIES} random histories: the journal holds exactly the accepted frames, byte for byte`, async () => {
  const seed = Number(process.env.CDP_SEED ?? Math.floor(Math.random() * 2 ** 31))
  process.stdout.write(`journal-history: CDP_SEED=${seed}\n`)
  for (let number = 0; number < HISTORIES; number++) {
    const random = seededRandom(seed + number)
    const limits = { segmentBytes: 10_000 + Math.floor(random() * 100_000), segmentRecords: 20 + Math.floor(random() * 200) }
    await using directory = await memoryDirectory()
    await using history = new History(directory.path, await openReadyStore(directory.path, sealer, limits), random, limits)
    for (let step = 0; step < STEPS; step++) await history.step()
    await history.check()
  }
}, 300_000)
