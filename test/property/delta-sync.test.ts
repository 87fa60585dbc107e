import { createHash } from 'node:crypto'
import { afterEach, beforeEach, describe, expect, jest, test } from '@jest/globals'
import { CdpError } from '../../core/errors/index.ts'
import { BASE_ALLOCATION } from '../../core/nbd/index.ts'
import type { Extent, NbdClient } from '../../core/nbd/index.ts'
import { RecordKind } from '../../core/record/index.ts'
import { HASH_EXTENT_BYTES, HashMark } from '../../core/stream/index.ts'
import type { ExtentHashes, HashRequest } from '../../core/stream/index.ts'
import { SlabPool } from '../../plugin/buffer/index.ts'
import { RaceGuard, SyncRun } from '../../plugin/sync/index.ts'
import type { HashSource, SyncDisk, SyncSink } from '../../plugin/sync/index.ts'
import { Random, testSeed } from '../kit/random.ts'

const MiB = 1024 * 1024
/** More than one window of hashes, and an end inside an extent. */
const DISK_BYTES = 17 * MiB + 512 * 3
const BITMAP = 'qemu:dirty-bitmap:b'
const GRAIN = 4096
const ZEROES = Buffer.alloc(HASH_EXTENT_BYTES)
const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
const turns = async (count: number): Promise<void> => {
  for (let n = 0; n < count; n++) await turn()
}

type Rec = { offsetBytes: number; data: Buffer }

/**
 * A guest, its source disk, the journal its writes end in, and the agent that is asked what it holds. A write is on the source first, arrives at capture
 * later, and overlapping ones wait for each other; the agent applies records later still.
 */
class Model {
  readonly random: Random
  readonly disk = Buffer.alloc(DISK_BYTES)
  /** What the replica held when the attach began. */
  base: Buffer = Buffer.alloc(DISK_BYTES)
  records: Rec[] = []
  /** What the agent has put into its mirror, in a first copy. */
  applied = 0
  mirror: Buffer = Buffer.alloc(0)
  readonly dirty = new Set<number>()
  readonly guard = new RaceGuard()
  capturing = true
  progress: { toBytes: number; seq: number }[] = []
  sentBytes = 0
  asked = 0
  #busy: { start: number; end: number }[] = []

  constructor(random: Random) {
    this.random = random
    for (let n = 0; n < 10; n++) {
      const at = 512 * random.int(0, DISK_BYTES / 512)
      this.disk.fill(random.int(1, 256), at, Math.min(DISK_BYTES, at + 512 * random.int(1, 4000)))
    }
    this.disk.copy(this.base)
    // What the replica lacks, has too much, or has wrong: by sector, by extent, in large.
    for (let n = random.int(0, 12); n > 0; n--) {
      const at = 512 * random.int(0, DISK_BYTES / 512)
      this.base.fill(random.chance(0.4) ? 0 : random.int(0, 256), at, Math.min(DISK_BYTES, at + 512 * (random.chance(0.3) ? random.int(1, 5000) : random.int(1, 40))))
    }
  }

  get seq(): number {
    return this.records.length
  }

  /** The replica as of a sequence. */
  asOf(seq: number): Buffer {
    const state = Buffer.from(this.base)
    for (const { offsetBytes, data } of this.records.slice(0, seq)) data.copy(state, offsetBytes)
    return state
  }

  #record(offsetBytes: number, data: Buffer): void {
    this.records.push({ offsetBytes, data: Buffer.from(data) })
  }

  readonly sink: SyncSink = {
    sync: (_disk, offsetBytes, data, start, end) => {
      this.sentBytes += end - start
      this.#record(offsetBytes, data.subarray(start, end))
    },
    takeLarge: (_kind, _disk, offsetBytes, lengthBytes, slab) => {
      this.sentBytes += lengthBytes
      this.#record(offsetBytes, slab.subarray(0, lengthBytes))
    },
    range: (kind, _disk, offsetBytes, lengthBytes) => {
      if (kind === RecordKind.syncProgress) this.progress.push({ toBytes: offsetBytes, seq: this.seq })
      else this.#record(offsetBytes, Buffer.alloc(lengthBytes))
    },
  }

  async write(): Promise<void> {
    const { random } = this
    const lengthBytes = 512 * (random.chance(0.2) ? random.int(1, 1000) : random.int(1, 20))
    const start = 512 * random.int(0, (DISK_BYTES - lengthBytes) / 512)
    const range = { start, end: start + lengthBytes }
    while (this.#busy.some((other) => other.start < range.end && range.start < other.end)) await turn()
    this.#busy.push(range)
    // Often the same bytes as before, or back to what the replica had.
    const data = random.chance(0.3) ? Buffer.from(this.base.subarray(range.start, range.end)) : Buffer.alloc(lengthBytes, random.chance(0.2) ? 0 : random.int(1, 256))
    data.copy(this.disk, start)
    for (let grain = Math.floor(start / GRAIN); grain * GRAIN < range.end; grain++) this.dirty.add(grain)
    await turns(random.int(0, 6))
    if (this.capturing) {
      this.#record(start, data)
      this.guard.cut(0, start, lengthBytes)
    }
    this.#busy.splice(this.#busy.indexOf(range), 1)
  }

  async writeUntil(done: () => boolean): Promise<void> {
    await Promise.all(Array.from({ length: 3 }, async () => {
      while (!done()) {
        await this.write()
        await turns(this.random.int(0, 3))
      }
    }))
  }

  async atRest(): Promise<void> {
    while (this.#busy.length > 0) await turn()
  }

  client(frozenDirty: ReadonlySet<number> = new Set(), failRead: (readNumber: number) => boolean = () => false): NbdClient {
    let reads = 0
    const { random } = this
    return {
      blockStatus: async (offsetBytes: number, lengthBytes: number, signal?: AbortSignal) => {
        await turns(random.int(0, 6))
        const zero: Extent[] = []
        const dirty: Extent[] = []
        const add = (extents: Extent[], flags: number, bytes: number): void => {
          const last = extents.at(-1)
          if (last?.flags === flags) last.lengthBytes += bytes
          else extents.push({ flags, lengthBytes: bytes })
        }
        for (let at = offsetBytes; at < offsetBytes + lengthBytes; at += GRAIN) {
          const bytes = Math.min(GRAIN, offsetBytes + lengthBytes - at)
          add(zero, this.disk.subarray(at, at + bytes).equals(ZEROES.subarray(0, bytes)) ? 3 : 0, bytes)
          add(dirty, frozenDirty.has(at / GRAIN) ? 1 : 0, bytes)
        }
        await turns(random.int(0, 6))
        signal?.throwIfAborted()
        return new Map([[BASE_ALLOCATION, zero], [BITMAP, dirty]])
      },
      readInto: async (target: Buffer, at: number, offsetBytes: number, lengthBytes: number, signal?: AbortSignal) => {
        const number = reads++
        await turns(random.int(0, 6))
        if (failRead(number)) throw new CdpError('NBD_REFUSED', 'EIO')
        this.disk.copy(target, at, offsetBytes, offsetBytes + lengthBytes)
        await turns(random.int(0, 6))
        signal?.throwIfAborted()
        return []
      },
    } as unknown as NbdClient
  }

  /** `fromMirror`: a first copy; extents are looked at one by one, while records are being applied. */
  hashes(fromMirror: boolean, answers: 'all' | 'some are damaged' = 'all'): HashSource {
    const { random } = this
    return {
      // What the plugin knows to be durable is always behind, by any amount.
      asOfSeq: () => random.int(0, this.seq + 1),
      ask: async (question: Omit<HashRequest, 'requestId'>, signal: AbortSignal): Promise<ExtentHashes> => {
        await turns(random.int(0, 20))
        if (random.chance(0.2)) throw new CdpError('NOT_FOUND', 'it has left the history')
        if (answers !== 'all' && random.chance(0.3)) throw new CdpError('JOURNAL_DAMAGED', 'not even the index')
        this.asked += question.extentCount
        const marks = new Uint8Array(question.extentCount)
        const hashes: Buffer[] = []
        let state = fromMirror ? this.mirror : this.asOf(question.asOfSeq)
        for (let extent = 0; extent < marks.length; extent++) {
          if (fromMirror && random.chance(0.1)) {
            await turns(random.int(0, 2))
            this.#applySome()
            state = this.mirror
          }
          const at = question.offsetBytes + extent * question.extentBytes
          const bytes = state.subarray(at, Math.min(DISK_BYTES, at + question.extentBytes))
          if (answers !== 'all' && random.chance(0.05)) marks[extent] = HashMark.unknown
          else if (bytes.equals(ZEROES.subarray(0, bytes.length))) marks[extent] = HashMark.zero
          else hashes.push(createHash('sha256').update(bytes).digest())
        }
        await turns(random.int(0, 6))
        signal.throwIfAborted()
        return { marks, hashes: Buffer.concat(hashes) }
      },
    }
  }

  #applySome(): void {
    const until = this.random.int(this.applied, this.seq + 1)
    for (; this.applied < until; this.applied++) this.records[this.applied].data.copy(this.mirror, this.records[this.applied].offsetBytes)
  }

  async sync(disk: Partial<SyncDisk>, client: NbdClient, hashes: HashSource, signal = new AbortController().signal): Promise<void> {
    await new SyncRun({
      disk: { disk: 0, sizeBytes: DISK_BYTES, fromBytes: 0, wholeAbove: true, byHash: true, ...disk },
      client, hashes, sink: this.sink, guard: this.guard, slabs: new SlabPool(MiB, 4 * MiB), admit: async (_bytes, given) => given.throwIfAborted(), onProgress: () => undefined, readsInFlight: 1 + this.random.int(0, 8), signal,
    }).run()
  }
}

const differing = (a: Buffer, b: Buffer): number => {
  if (a.equals(b)) return -1
  for (let at = 0; ; at++) if (a[at] !== b[at]) return at
}

describe('a delta sync against concurrent writes', () => {
  let seed = 0
  beforeEach(() => {
    seed = testSeed()
    process.stdout.write(`seed ${seed}\n`)
    // Progress is told about once a second, a position renewed twice a minute; here after a few looks at the clock.
    let nowMs = 0
    jest.spyOn(performance, 'now').mockImplementation(() => (nowMs += 2_000))
  })
  afterEach(() => void jest.restoreAllMocks())

  test.each(['as of any sequence of the attach', 'a mirror that is being filled', 'a journal with damage'])('%s: replay is the disk, then and at every checkpoint after it', async (what) => {
    for (let run = 0; run < 12; run++) {
      const vm = new Model(new Random(seed + run))
      vm.mirror = Buffer.from(vm.base)
      let done = false
      const hashes = vm.hashes(what === 'a mirror that is being filled', what === 'a journal with damage' ? 'some are damaged' : 'all')
      await Promise.all([vm.sync({}, vm.client(), hashes).finally(() => (done = true)), vm.writeUntil(() => done)])
      expect([run, differing(vm.asOf(vm.seq), vm.disk), vm.progress.at(-1)?.toBytes, vm.guard.busy]).toEqual([run, -1, DISK_BYTES, false])
      for (let checkpoint = 0; checkpoint < 3; checkpoint++) {
        await Promise.all(Array.from({ length: vm.random.int(1, 5) }, () => vm.write()))
        await vm.atRest()
        expect([run, checkpoint, differing(vm.asOf(vm.seq), vm.disk)]).toEqual([run, checkpoint, -1])
      }
    }
  })

  test('of a replica that is the same nothing is sent, and holes are not read', async () => {
    const vm = new Model(new Random(seed))
    vm.disk.copy(vm.base)
    const client = vm.client()
    let readBytes = 0
    const readInto = client.readInto.bind(client)
    client.readInto = (target, at, offsetBytes, lengthBytes, signal) => {
      readBytes += lengthBytes
      return readInto(target, at, offsetBytes, lengthBytes, signal)
    }
    await vm.sync({}, client, vm.hashes(false))
    expect(vm.records).toEqual([])
    let dataBytes = 0
    for (let at = 0; at < DISK_BYTES; at += HASH_EXTENT_BYTES) {
      const bytes = vm.disk.subarray(at, at + HASH_EXTENT_BYTES)
      if (!bytes.equals(ZEROES.subarray(0, bytes.length))) dataBytes += bytes.length
    }
    expect(readBytes).toBe(dataBytes)
  })

  test('interrupted by an abort, a read or a question that fails, it goes on from its durable progress and the bitmap', async () => {
    let interrupted = 0
    let resumedAbove0 = 0
    for (let run = 0; run < 24; run++) {
      const vm = new Model(new Random(seed + run))
      vm.mirror = Buffer.from(vm.base)
      const failing = run % 2 === 0 ? vm.random.int(0, 12) : -1
      const abort = new AbortController()
      let done = false
      const first = vm.sync({}, vm.client(new Set(), (read) => read === failing), vm.hashes(run % 3 === 0), abort.signal).then(() => 'done', () => 'interrupted').finally(() => (done = true))
      if (failing < 0) void turns(vm.random.int(10, 300)).then(() => abort.abort(new CdpError('ABORTED', 'link down')))
      await Promise.all([first, vm.writeUntil(() => done)])
      if ((await first) === 'done') continue
      interrupted++
      vm.guard.clear()
      // What was not durable at the agent is lost with the attach; what follows is a new one on what is left.
      const durableSeq = vm.random.int(0, vm.seq + 1)
      const fromBytes = vm.progress.findLast(({ seq }) => seq <= durableSeq)?.toBytes ?? 0
      if (fromBytes > 0) resumedAbove0++
      vm.base = vm.asOf(durableSeq)
      vm.mirror = Buffer.from(vm.base)
      vm.applied = 0
      vm.records = []
      vm.progress = []
      vm.capturing = false
      for (let n = 0; n < 4; n++) await vm.write()
      vm.capturing = true
      const frozen = new Set(vm.dirty)
      done = false
      await Promise.all([vm.sync({ fromBytes, bitmapContext: BITMAP }, vm.client(frozen), vm.hashes(run % 3 === 0)).finally(() => (done = true)), vm.writeUntil(() => done)])
      expect([run, differing(vm.asOf(vm.seq), vm.disk), vm.guard.busy]).toEqual([run, -1, false])
    }
    expect(interrupted).toBeGreaterThan(6)
    expect(resumedAbove0).toBeGreaterThan(0)
  })
})
