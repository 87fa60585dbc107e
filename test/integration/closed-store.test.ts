import { mkdir, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { silentLogger } from '../../core/log/index.ts'
import { Catalogue } from '../../agent/checkpoint/index.ts'
import { SegmentSealer } from '../../agent/journal/index.ts'
import { DISKS, memoryDirectory, syncEndFrame } from '../../agent/journal/testing.ts'
import { VmRegistry } from '../../agent/ingest/index.ts'

const SITE = 'site-a'
const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

test('a store that cannot be opened again stays in the list, closed, so that what it holds can be read; it is opened as soon as it can be', async () => {
  await using directory = await memoryDirectory()
  using catalogue = new Catalogue(':memory:')
  await using registry = new VmRegistry({ directory: join(directory.path, 'vms'), catalogue, sealer, clock: { nowUnixMs: Date.now }, log: silentLogger, onValid: () => undefined })
  const { store } = await registry.open(SITE, '101')
  await store.beginEpoch(DISKS)
  store.accept(syncEndFrame(1))
  await store.flush()

  // As after an error of its disk: it takes nothing any more, and its files cannot be opened for writing.
  await store[Symbol.asyncDispose]()
  const hint = join(store.directory, 'durable.hint')
  await rm(hint)
  await mkdir(hint)
  await expect(registry.open(SITE, '101')).rejects.toMatchObject({ code: 'EISDIR' })
  expect(registry.get(SITE, '101')?.store).toBe(store)
  expect(registry.list().map(({ store: one }) => [one.condition, one.disksAt(1)])).toEqual([['closed', DISKS]])

  await rm(hint, { recursive: true })
  const again = await registry.open(SITE, '101')
  expect([again.store.condition, again.store.epoch, registry.get(SITE, '101')]).toEqual(['open', 1, again])
})
