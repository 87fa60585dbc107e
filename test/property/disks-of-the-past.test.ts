import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { PointDesk } from '../../agent/api/index.ts'
import { Catalogue } from '../../agent/checkpoint/index.ts'
import { VmRegistry } from '../../agent/ingest/index.ts'
import { SegmentSealer } from '../../agent/journal/index.ts'
import type { VmStore } from '../../agent/journal/index.ts'
import { buildFrame, memoryDirectory, syncEndFrame } from '../../agent/journal/testing.ts'
import type { RecordSpec } from '../../agent/journal/testing.ts'
import { PointServer } from '../../agent/recovery/index.ts'
import { EventLog } from '../../core/api/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { NbdClient } from '../../core/nbd/index.ts'
import { RecordKind } from '../../core/record/index.ts'
import type { DiskEntry } from '../../core/record/index.ts'

// Disks come, go, grow and shrink: a checkpoint shows those of its time, with their sizes of then.

const SITE = 'site-a'
const VPG = 'shop'
const MiB = 1 << 20
const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

type Site = AsyncDisposable & { store: VmStore; desk: PointDesk }

const open = async (directory: string): Promise<Site> => {
  await using stack = new AsyncDisposableStack()
  const catalogue = stack.use(new Catalogue(':memory:'))
  const registry = stack.use(new VmRegistry({ directory: join(directory, 'vms'), catalogue, sealer, clock: { nowUnixMs: Date.now }, log: silentLogger, onValid: () => undefined, limits: { segmentBytes: MiB, segmentRecords: 8 } }))
  const points = stack.use(await PointServer.listen({ socketPath: join(directory, 'points') }))
  const { store } = await registry.open(SITE, '101')
  const held = stack.move()
  return { store, desk: new PointDesk({ catalogue, registry, points, events: new EventLog() }), [Symbol.asyncDispose]: () => held.disposeAsync() }
}

/** Keys and sizes in MiB of the disks that a checkpoint shows, and the first byte of each. */
const shown = async ({ desk }: Site, directory: string, id: string): Promise<string[]> => {
  const point = await desk.open(VPG, id)
  const disks: string[] = []
  for (const { key, sizeBytes, uri } of point.disks) {
    const exportName = decodeURIComponent(new URL(uri).pathname.slice(1))
    await using client = await NbdClient.connect({ path: join(directory, 'points') }, { exportName })
    expect(client.sizeBytes).toBe(sizeBytes)
    disks.push(`${key} ${sizeBytes / MiB} ${(await client.read(0, 4096))[0]} ${(await client.read(sizeBytes - 4096, 4096))[0]}`)
  }
  await desk.close(point.pointId)
  return disks.sort()
}

test('a checkpoint shows the disks of its time', async () => {
  await using directory = await memoryDirectory()
  let seq = 1
  const put = async ({ store }: Site, ...records: RecordSpec[]): Promise<void> => {
    store.accept(buildFrame({ firstSeq: seq + 1, epoch: store.epoch, records }))
    seq += records.length
    await store.flush()
  }
  const places = new Map<string, number>()
  const cut = (site: Site, id: string, atUnixMs: number): Promise<void> => {
    places.set(id, seq)
    return put(site, { kind: RecordKind.checkpoint, offsetBytes: seq, json: { id, vpg: VPG, vms: ['101'], atUnixMs, kind: 'automatic' } })
  }
  const write = (disk: number, fill: number, offsetBytes = 0): RecordSpec => ({ kind: RecordKind.write, disk, fill, offsetBytes })
  const expected = {
    two: ['scsi0 8 1 0', 'scsi1 4 2 0'],
    grown: ['scsi0 16 1 3', 'scsi1 4 2 0'],
    other: ['scsi0 16 4 3', 'scsi2 2 5 0'],
    shrunk: ['scsi0 8 6 0', 'scsi2 2 5 0'],
  }
  const expectAll = async (site: Site, names: (keyof typeof expected)[]): Promise<void> => {
    for (const name of names) expect([name, await shown(site, directory.path, name)]).toEqual([name, expected[name]])
  }
  {
    await using site = await open(directory.path)
    const { store } = site
    await store.beginEpoch([{ disk: 0, key: 'scsi0', sizeBytes: 8 * MiB }, { disk: 1, key: 'scsi1', sizeBytes: 4 * MiB }])
    store.accept(syncEndFrame(1))
    await store.flush()
    await put(site, write(0, 1), write(1, 2))
    await cut(site, 'two', 1_000)
    await put(site, { kind: RecordKind.resize, disk: 0, offsetBytes: 16 * MiB }, write(0, 3, 16 * MiB - 4096))
    await cut(site, 'grown', 2_000)
    // An attach of which nothing is recorded, and the one after it.
    await store.beginEpoch([{ disk: 0, key: 'scsi0', sizeBytes: 16 * MiB }])
    await store.beginEpoch([{ disk: 0, key: 'scsi0', sizeBytes: 16 * MiB }, { disk: 9, key: 'scsi2', sizeBytes: 2 * MiB }])
    const [, { disk: added }] = store.disks
    await put(site, write(0, 4), write(added, 5))
    await cut(site, 'other', 3_000)
    await expectAll(site, ['two', 'grown', 'other'])
    await store.beginEpoch([{ disk: 0, key: 'scsi0', sizeBytes: 8 * MiB }, { disk: 1, key: 'scsi2', sizeBytes: 2 * MiB }])
    await put(site, write(store.disks[0].disk, 6))
    await cut(site, 'shrunk', 4_000)
    await expectAll(site, ['two', 'grown', 'other', 'shrunk'])
  }
  await using site = await open(directory.path)
  await expectAll(site, ['two', 'grown', 'other', 'shrunk'])
  // With history goes what its disks were.
  const grownSeq = places.get('grown')!
  await site.store.base.promote(grownSeq)
  await expectAll(site, ['grown', 'other', 'shrunk'])
  await site.store.beginEpoch([{ disk: 0, key: 'scsi0', sizeBytes: 8 * MiB }])
  expect(site.store.disksAt(1)).toEqual(site.store.disksAt(grownSeq))
  await expectAll(site, ['grown', 'other', 'shrunk'])
}, 60_000)

test('a disk that joins is in checkpoints from its record on, also of a store that was opened again, and of one whose vm.json could not be written', async () => {
  await using directory = await memoryDirectory()
  let seq = 1
  const put = async ({ store }: Site, ...records: RecordSpec[]): Promise<void> => {
    store.accept(buildFrame({ firstSeq: seq + 1, epoch: store.epoch, records }))
    seq += records.length
    await store.flush()
  }
  const cut = (id: string): RecordSpec => ({ kind: RecordKind.checkpoint, offsetBytes: seq, json: { id, vpg: VPG, vms: ['101'], atUnixMs: seq, kind: 'automatic' } })
  const scsi0 = { disk: 0, key: 'scsi0', sizeBytes: 8 * MiB }
  const scsi1 = { disk: 1, key: 'scsi1', sizeBytes: 4 * MiB }
  const write = (disk: number, fill: number): RecordSpec => ({ kind: RecordKind.write, disk, fill, offsetBytes: 0 })
  const without = ['scsi0 8 1 0']
  const whole = ['scsi0 8 2 0', 'scsi1 4 3 0']
  {
    await using site = await open(directory.path)
    const { store } = site
    await store.beginEpoch([scsi0], { joins: true })
    store.accept(syncEndFrame(1))
    await store.flush()
    await store.beginEpoch([scsi0, scsi1], { joins: true })
    expect(store.disks).toEqual([scsi0, { ...scsi1, joining: true }])
    await put(site, write(0, 1), write(1, 3))
    await put(site, cut('without'))
    expect(await shown(site, directory.path, 'without')).toEqual(without)
  }
  {
    await using site = await open(directory.path)
    const { store } = site
    // Its copy was broken off: it still joins, unless the one that attaches knows nothing of joining.
    expect((await store.beginEpoch([scsi0, scsi1])).disks).toEqual([scsi0, scsi1])
    await store.beginEpoch([scsi0], { joins: true })
    expect((await store.beginEpoch([scsi0, scsi1], { joins: true })).disks).toEqual([scsi0, { disk: 2, key: 'scsi1', sizeBytes: 4 * MiB, joining: true }])
    expect((await store.beginEpoch([scsi0, scsi1], { joins: true })).disks).toEqual([scsi0, { disk: 2, key: 'scsi1', sizeBytes: 4 * MiB, joining: true }])
    // Another attach while what was taken is not durable yet: that the disk has joined counts.
    store.accept(buildFrame({ firstSeq: seq + 1, epoch: store.epoch, records: [write(0, 2), write(2, 3), { kind: RecordKind.joined, disk: 2 }] }))
    seq += 3
    expect((await store.beginEpoch([scsi0, scsi1], { joins: true })).disks).toEqual([scsi0, { disk: 2, key: 'scsi1', sizeBytes: 4 * MiB }])
    await put(site, cut('whole'))
    expect(store.disks).toEqual([scsi0, { ...scsi1, disk: 2 }])
    expect(await shown(site, directory.path, 'whole')).toEqual(whole)
    expect(await shown(site, directory.path, 'without')).toEqual(without)
  }
  // A crash between the journal and vm.json: the record counts.
  const statePath = join(directory.path, 'vms', SITE, '101', 'vm.json')
  const state = JSON.parse(await readFile(statePath, 'utf8')) as { epoch: number; disks: DiskEntry[]; disksBefore?: unknown[] }
  // As of the attach in which it joined.
  state.epoch--
  state.disks = [scsi0, { ...scsi1, disk: 2, joining: true }]
  state.disksBefore?.pop()
  await writeFile(statePath, JSON.stringify(state))
  await using site = await open(directory.path)
  expect(await shown(site, directory.path, 'whole')).toEqual(whole)
  expect(await shown(site, directory.path, 'without')).toEqual(without)
  expect((JSON.parse(await readFile(statePath, 'utf8')) as typeof state).disks).toEqual([scsi0, { ...scsi1, disk: 2 }])
}, 60_000)
