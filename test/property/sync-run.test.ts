import { afterEach, beforeEach, describe, expect, jest, test } from '@jest/globals'
import { CdpError } from '../../core/errors/index.ts'
import { BASE_ALLOCATION, MemoryExport, NbdClient, NbdServer } from '../../core/nbd/index.ts'
import type { Extent } from '../../core/nbd/index.ts'
import { RecordKind } from '../../core/record/index.ts'
import { SlabPool } from '../../plugin/buffer/index.ts'
import { RaceGuard, SyncRun } from '../../plugin/sync/index.ts'
import type { SyncDisk, SyncSink } from '../../plugin/sync/index.ts'
import { temporaryDirectory } from '../../agent/journal/testing.ts'
import { Random, testSeed } from '../kit/random.ts'

const MiB = 1024 * 1024
const DISK_BYTES = 6 * MiB
const BITMAP = 'qemu:dirty-bitmap:b'
const GRAIN = 4096
const ZEROES = Buffer.alloc(GRAIN)
const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
const turns = async (count: number): Promise<void> => {
  for (let n = 0; n < count; n++) await turn()
}

/** The source as QEMU sees it: a write goes to the disk first, arrives at capture later, and overlapping ones wait for each other. */
class ModelVm {
  readonly disk = Buffer.alloc(DISK_BYTES)
  readonly mirror = Buffer.alloc(DISK_BYTES)
  readonly dirty = new Set<number>()
  readonly guard = new RaceGuard()
  readonly random: Random
  capturing = true
  progressBytes = 0
  syncRecords = 0
  #busy: { start: number; end: number }[] = []

  constructor(random: Random) {
    this.random = random
    for (let n = 0; n < 12; n++) {
      const at = GRAIN * random.int(0, DISK_BYTES / GRAIN)
      this.disk.fill(random.int(1, 256), at, Math.min(DISK_BYTES, at + GRAIN * random.int(1, 200)))
    }
    // What the replica held before is worth nothing: a first copy must write over all of it.
    this.mirror.fill(0xee)
  }

  readonly sink: SyncSink = {
    sync: (_disk, offsetBytes, data, start, end) => {
      this.syncRecords++
      data.copy(this.mirror, offsetBytes, start, end)
    },
    takeLarge: (_kind, _disk, offsetBytes, lengthBytes, slab) => {
      this.syncRecords++
      slab.copy(this.mirror, offsetBytes, 0, lengthBytes)
    },
    range: (kind, _disk, offsetBytes, lengthBytes) => {
      if (kind === RecordKind.syncProgress) this.progressBytes = offsetBytes
      else this.mirror.fill(0, offsetBytes, offsetBytes + lengthBytes)
    },
  }

  async write(): Promise<void> {
    const { random } = this
    const lengthBytes = 512 * (random.chance(0.2) ? random.int(1, 1000) : random.int(1, 20))
    const start = 512 * random.int(0, (DISK_BYTES - lengthBytes) / 512)
    const range = { start, end: start + lengthBytes }
    while (this.#busy.some((other) => other.start < range.end && range.start < other.end)) await turn()
    this.#busy.push(range)
    const zero = random.chance(0.2)
    const data = Buffer.alloc(lengthBytes, zero ? 0 : random.int(1, 256))
    data.copy(this.disk, start)
    for (let grain = Math.floor(start / GRAIN); grain * GRAIN < range.end; grain++) this.dirty.add(grain)
    await turns(random.int(0, 4))
    if (this.capturing) {
      data.copy(this.mirror, start)
      this.guard.cut(0, start, lengthBytes)
    }
    this.#busy.splice(this.#busy.indexOf(range), 1)
  }

  async writeUntil(done: () => boolean): Promise<void> {
    const writers = Array.from({ length: 3 }, async () => {
      while (!done()) {
        await this.write()
        await turns(this.random.int(0, 3))
      }
    })
    await Promise.all(writers)
  }

  /** QEMU's read-only export: each answer is from some moment between question and reply. */
  client(frozenDirty: ReadonlySet<number>, failRead: (readNumber: number) => boolean = () => false): NbdClient {
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

  async sync(disk: Partial<SyncDisk>, client: NbdClient, signal = new AbortController().signal): Promise<void> {
    await new SyncRun({
      disk: { disk: 0, sizeBytes: DISK_BYTES, fromBytes: 0, wholeAbove: true, ...disk },
      client, sink: this.sink, guard: this.guard, slabs: new SlabPool(MiB, 4 * MiB), admit: async (_bytes, given) => given.throwIfAborted(), onProgress: () => undefined, readsInFlight: 1 + this.random.int(0, 8), signal,
    }).run()
  }
}

const differing = (a: Buffer, b: Buffer): number => {
  if (a.equals(b)) return -1
  for (let at = 0; ; at++) if (a[at] !== b[at]) return at
}

describe('a copy against concurrent writes', () => {
  let seed = 0
  beforeEach(() => {
    seed = testSeed()
    process.stdout.write(`seed ${seed}\n`)
    // Progress is told about once a second; here after every few looks at the clock.
    let nowMs = 0
    jest.spyOn(performance, 'now').mockImplementation(() => (nowMs += 300))
  })
  afterEach(() => void jest.restoreAllMocks())

  test('whole: replay of the records is the disk, after any interleaving', async () => {
    for (let run = 0; run < 15; run++) {
      const vm = new ModelVm(new Random(seed + run))
      let done = false
      await Promise.all([vm.sync({}, vm.client(new Set())).finally(() => (done = true)), vm.writeUntil(() => done)])
      expect([run, differing(vm.mirror, vm.disk), vm.progressBytes, vm.guard.busy]).toEqual([run, -1, DISK_BYTES, false])
    }
  })

  test('by dirty bitmap: only its extents are read, and the disks agree', async () => {
    for (let run = 0; run < 15; run++) {
      const vm = new ModelVm(new Random(seed + run))
      vm.disk.copy(vm.mirror)
      vm.capturing = false
      for (let n = 0; n < 5; n++) await vm.write()
      const frozen = new Set(vm.dirty)
      vm.capturing = true
      let done = false
      await Promise.all([vm.sync({ bitmapContext: BITMAP, wholeAbove: false }, vm.client(frozen)).finally(() => (done = true)), vm.writeUntil(() => done)])
      expect([run, differing(vm.mirror, vm.disk), vm.progressBytes]).toEqual([run, -1, 0])
    }
  })

  test('interrupted by an abort or by a read that fails, it goes on from its progress and the bitmap, and the disks agree', async () => {
    let interrupted = 0
    let resumedAbove0 = 0
    for (let run = 0; run < 24; run++) {
      const vm = new ModelVm(new Random(seed + run))
      const failing = run % 2 === 0 ? vm.random.int(0, 6) : -1
      const abort = new AbortController()
      let done = false
      const first = vm.sync({}, vm.client(new Set(), (read) => read === failing), abort.signal).then(() => 'done', () => 'interrupted').finally(() => (done = true))
      if (failing < 0) void turns(vm.random.int(1, 120)).then(() => abort.abort(new CdpError('ABORTED', 'link down')))
      await Promise.all([first, vm.writeUntil(() => done)])
      if ((await first) === 'done') continue
      interrupted++
      if (vm.progressBytes > 0) resumedAbove0++
      vm.guard.clear()
      vm.capturing = false
      for (let n = 0; n < 4; n++) await vm.write()
      vm.capturing = true
      const frozen = new Set(vm.dirty)
      done = false
      await Promise.all([vm.sync({ fromBytes: vm.progressBytes, bitmapContext: BITMAP }, vm.client(frozen)).finally(() => (done = true)), vm.writeUntil(() => done)])
      expect([run, differing(vm.mirror, vm.disk), vm.guard.busy]).toEqual([run, -1, false])
    }
    expect(interrupted).toBeGreaterThan(6)
    expect(resumedAbove0).toBeGreaterThan(0)
  })
})

describe('RaceGuard', () => {
  test('what is left of a read is what no operation touched, to the sector', () => {
    const random = new Random(testSeed())
    process.stdout.write(`seed ${random.seed}\n`)
    for (let run = 0; run < 300; run++) {
      const guard = new RaceGuard()
      const read = guard.register(1, 512 * 100, 512 * 64)
      const left = new Set(Array.from({ length: 64 }, (_, at) => at + 100))
      for (let n = random.int(0, 12); n > 0; n--) {
        const start = random.int(80, 180)
        const length = random.int(1, 30)
        const disk = random.int(0, 4) === 0 ? 2 : 1
        guard.cut(disk, start * 512, length * 512)
        if (disk === 1) for (let at = start; at < start + length; at++) left.delete(at)
      }
      const spans = read.take()
      expect(spans.flatMap(({ offsetBytes, lengthBytes }) => Array.from({ length: lengthBytes / 512 }, (_, at) => offsetBytes / 512 + at))).toEqual([...left])
      expect(guard.busy).toBe(false)
    }
  })
})

test('over a real NBD connection: data, holes, and a read the server refuses', async () => {
  await using directory = await temporaryDirectory('/tmp')
  const disk = new MemoryExport({ name: 'scsi0', sizeBytes: DISK_BYTES, readOnly: true })
  const vm = new ModelVm(new Random(1))
  vm.disk.copy(disk.bytes)
  await using server = await NbdServer.listen({ address: { path: `${directory.path}/s` }, findExport: () => disk, listExports: () => [disk] })
  await using client = await NbdClient.connect({ path: `${directory.path}/s` }, { exportName: 'scsi0', metaContexts: [BASE_ALLOCATION] })
  await vm.sync({}, client)
  expect(differing(vm.mirror, vm.disk)).toBe(-1)
  await expect(vm.sync({ bitmapContext: BITMAP, wholeAbove: false }, client)).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
  const gone = vm.sync({}, client)
  await client[Symbol.asyncDispose]()
  await expect(gone).rejects.toMatchObject({ code: 'CLOSED' })
  expect(vm.guard.busy).toBe(false)
  expect(server.address).toEqual({ path: `${directory.path}/s` })
})
