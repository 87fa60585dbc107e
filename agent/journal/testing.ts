import { existsSync } from 'node:fs'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { silentLogger } from '../../core/log/index.ts'
import { alignToSector, FLAG_DIRECT, FrameBuilder, RecordKind } from '../../core/record/index.ts'
import type { Compressor, DiskEntry } from '../../core/record/index.ts'
import { VmStore } from './index.ts'
import type { SegmentSealer, VmStoreOptions } from './index.ts'

// Frames, a pseudo-random source and stores in temporary directories, for the tests of this folder and those in test/.

export const VM = 'site-a/101'
export const DISKS: DiskEntry[] = [
  { disk: 0, key: 'scsi0', sizeBytes: 8 * 1024 * 1024 },
  { disk: 1, key: 'scsi1', sizeBytes: 4 * 1024 * 1024 },
]

/** One record for `buildFrame`. Data are given, or made from `fill`. */
export type RecordSpec = { kind: RecordKind; disk?: number; offsetBytes?: number; lengthBytes?: number; fill?: number; data?: Buffer; json?: unknown }

export type FrameSpec = { firstSeq: number; epoch?: number; atUnixMs?: number; direct?: boolean; records: RecordSpec[]; compress?: Compressor }

export const buildFrame = ({ firstSeq, epoch = 1, atUnixMs = 1_700_000_000_000 + firstSeq, direct = false, records, compress }: FrameSpec): Buffer => {
  const needed = records.reduce((sum, { lengthBytes = 4096, data, json }) => sum + alignToSector(json === undefined ? (data?.length ?? lengthBytes) : Buffer.byteLength(JSON.stringify(json))), 0)
  const builder = new FrameBuilder(Buffer.alloc(Math.min(needed, 4 * 1024 * 1024)), Math.max(1, records.length))
  for (const { kind, disk = 0, offsetBytes = 0, lengthBytes = 4096, fill = 0, data, json } of records) {
    if (json !== undefined) {
      builder.addJson(kind, offsetBytes, JSON.stringify(json))
    } else if (kind === RecordKind.write || kind === RecordKind.sync) {
      const bytes = data ?? Buffer.alloc(lengthBytes, fill)
      const at = builder.reserveData(kind, disk, offsetBytes, bytes.length)
      bytes.copy(builder.payload, at)
    } else {
      builder.addRange(kind, disk, offsetBytes, kind === RecordKind.resize || kind === RecordKind.syncProgress ? 0 : lengthBytes)
    }
  }
  const { head, payload } = builder.seal({ firstSeq, epoch, atUnixMs, flags: direct ? FLAG_DIRECT : 0 }, compress)
  return Buffer.concat([head, payload])
}

/** The frame that ends an initial sync. */
export const syncEndFrame = (firstSeq: number, epoch = 1): Buffer =>
  buildFrame({ firstSeq, epoch, direct: true, records: [{ kind: RecordKind.syncEnd, json: { kind: 'initial' } }] })

/** mulberry32: small, seeded, good enough to pick things. */
export const seededRandom = (seed: number): (() => number) => {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 0x1_0000_0000
  }
}

export const temporaryDirectory = async (parent = tmpdir()): Promise<AsyncDisposable & { path: string }> => {
  const path = await mkdtemp(join(parent, 'cdp-'))
  return { path, [Symbol.asyncDispose]: () => rm(path, { recursive: true, force: true }) }
}

/** A temporary directory in memory where there is one: for tests that open a store thousands of times. */
export const memoryDirectory = (): ReturnType<typeof temporaryDirectory> => temporaryDirectory(existsSync('/dev/shm') ? '/dev/shm' : tmpdir())

/** Opens the store of `directory` with limits small enough for many segments. */
export const openStore = (directory: string, sealer: SegmentSealer, limits: VmStoreOptions['limits'] = {}): Promise<VmStore> =>
  VmStore.open({ directory, vm: VM, log: silentLogger, clock: { nowUnixMs: () => 1_700_000_000_000 }, sealer, limits })

/** A new store whose initial sync is over: sequence 1 was its end, epoch 1 may append from 2 on. */
export const openReadyStore = async (directory: string, sealer: SegmentSealer, limits: VmStoreOptions['limits'] = {}): Promise<VmStore> => {
  const store = await openStore(directory, sealer, limits)
  await store.beginEpoch(DISKS)
  store.accept(syncEndFrame(1))
  await store.flush()
  return store
}
