import { afterEach, expect, jest, test } from '@jest/globals'
import { CdpError } from '../../core/errors/index.ts'
import type { NbdClient } from '../../core/nbd/index.ts'
import { RecordKind } from '../../core/record/index.ts'
import { SlabPool } from '../buffer/index.ts'
import { RaceGuard, SyncRun } from './index.ts'

const MiB = 1024 * 1024
afterEach(() => void jest.restoreAllMocks())

test('progress never passes a read that failed, even if the rest of the disk is found empty meanwhile', async () => {
  let nowMs = 0
  jest.spyOn(performance, 'now').mockImplementation(() => (nowMs += 2000))
  const failing = Promise.withResolvers<never>()
  const second = Promise.withResolvers<void>()
  let asked = 0
  const client = {
    blockStatus: async (_offset: number, lengthBytes: number) => {
      if (asked++ === 0) return new Map([['base:allocation', [{ lengthBytes: MiB, flags: 0 }, { lengthBytes: lengthBytes - MiB, flags: 3 }]]])
      failing.reject(new CdpError('NBD_REFUSED', 'EIO'))
      await second.promise
      return new Map([['base:allocation', [{ lengthBytes, flags: 3 }]]])
    },
    readInto: () => failing.promise,
  } as unknown as NbdClient
  const progress: number[] = []
  const guard = new RaceGuard()
  const run = new SyncRun({
    disk: { disk: 0, sizeBytes: 512 * MiB, fromBytes: 0, wholeAbove: true }, client, guard, slabs: new SlabPool(MiB, MiB), admit: async () => undefined, onProgress: () => undefined, readsInFlight: 8, signal: new AbortController().signal,
    sink: { sync: () => undefined, takeLarge: () => undefined, range: (kind, _disk, offsetBytes) => void (kind === RecordKind.syncProgress && progress.push(offsetBytes)) },
  }).run()
  run.catch(() => undefined)
  await new Promise((resolve) => setImmediate(resolve))
  second.resolve()
  await expect(run).rejects.toMatchObject({ code: 'NBD_REFUSED' })
  expect(Math.max(0, ...progress)).toBe(0)
  expect(guard.busy).toBe(false)
})

test('by bitmap: dirty zeroes become one record each and are not read, dirty data are, and what is clean is left alone', async () => {
  const [dirty, zero] = [1, 3]
  const reads: string[] = []
  const client = {
    blockStatus: async () => new Map([
      ['base:allocation', [{ lengthBytes: 2 * MiB, flags: 0 }, { lengthBytes: 4 * MiB, flags: zero }, { lengthBytes: 2 * MiB, flags: 0 }]],
      ['b', [{ lengthBytes: MiB, flags: 0 }, { lengthBytes: 3 * MiB, flags: dirty }, { lengthBytes: MiB, flags: 0 }, { lengthBytes: 3 * MiB, flags: dirty }]],
    ]),
    readInto: async (slab: Buffer, _at: number, offsetBytes: number, lengthBytes: number) => {
      reads.push(`${offsetBytes / MiB}+${lengthBytes / MiB}`)
      slab.fill(7, 0, lengthBytes)
    },
  } as unknown as NbdClient
  const zeroes: string[] = []
  let copiedBytes = 0
  await new SyncRun({
    disk: { disk: 0, sizeBytes: 8 * MiB, fromBytes: 0, wholeAbove: false, bitmapContext: 'b' }, client, guard: new RaceGuard(), slabs: new SlabPool(MiB, 8 * MiB), admit: async () => undefined,
    onProgress: (bytes) => void (copiedBytes += bytes), readsInFlight: 2, signal: new AbortController().signal,
    sink: { sync: () => undefined, takeLarge: () => undefined, range: (kind, _disk, offsetBytes, lengthBytes) => void (kind === RecordKind.syncZero && zeroes.push(`${offsetBytes / MiB}+${lengthBytes / MiB}`)) },
  }).run()
  expect([reads, zeroes, copiedBytes]).toEqual([['1+1', '6+1', '7+1'], ['2+2', '5+1'], 6 * MiB])
})
