import { existsSync } from 'node:fs'
import { mkdir, rename } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { deleteReplica, listReplicas } from '../../agent/api/index.ts'
import type { ReplicaParts } from '../../agent/api/index.ts'
import { SegmentSealer } from '../../agent/journal/index.ts'
import { buildFrame, memoryDirectory, syncEndFrame } from '../../agent/journal/testing.ts'
import { PointServer } from '../../agent/recovery/index.ts'
import { NbdClient } from '../../core/nbd/index.ts'
import { RecordKind } from '../../core/record/index.ts'
import { Random } from '../kit/random.ts'
import { GROUP_DISKS, RetentionSite, SITE, VPG } from '../kit/retention-site.ts'

const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

const siteOf = (directory: string): Promise<RetentionSite> => RetentionSite.open({ directory, sealer, random: new Random(3), cataloguePath: join(directory, 'catalogue.sqlite') })

const partsOf = (site: RetentionSite, connected: Set<string>): ReplicaParts => ({
  catalogue: site.catalogue, registry: site.registry, pins: site.pins, retention: site.keeper, events: site.events,
  ingest: { isConnected: (_: string, vm: string) => connected.has(vm) } as unknown as ReplicaParts['ingest'],
})

/** A VM of no group, with a journal. */
const stray = async (site: RetentionSite, vm: string): Promise<void> => {
  const { store } = await site.registry.open(SITE, vm)
  await store.beginEpoch(GROUP_DISKS)
  store.accept(syncEndFrame(1))
  store.accept(buildFrame({ firstSeq: 2, records: [{ kind: RecordKind.epoch, json: { reason: 'a test', disks: GROUP_DISKS } }] }))
  await store.flush()
}

test('the replica of a VM that left its group is seen and can be deleted; one that is protected, read, needed or not named twice stays', async () => {
  await using directory = await memoryDirectory()
  await using site = await siteOf(directory.path)
  for (let n = 0; n < 3; n++) site.cut()
  await site.flush()
  await stray(site, '103')
  const connected = new Set(['101', '103'])
  const parts = partsOf(site, connected)
  const states = async (): Promise<string[]> => (await listReplicas(parts)).replicas.map(({ vmId, vpg, state, checkpoints }) => `${vmId} ${vpg ?? '-'} ${state} ${checkpoints}`).sort()
  expect(await states()).toEqual([`101 ${VPG} protected 3`, `102 ${VPG} silent 3`, '103 - protected 0'])

  await expect(deleteReplica(parts, { vmId: 103, confirm: '103' })).rejects.toMatchObject({ code: 'CONFLICT', message: expect.stringContaining('is protected') as unknown })
  connected.delete('103')
  await expect(deleteReplica(parts, { vmId: 103, confirm: '101' })).rejects.toMatchObject({ code: 'BAD_INPUT' })
  await expect(deleteReplica(parts, { vmId: 104, confirm: '104' })).rejects.toMatchObject({ code: 'NOT_FOUND' })
  const pin = site.pins.pin(site.vmDirectory('103'), 2, 'recovery point p-1')
  await expect(deleteReplica(parts, { vmId: 103, confirm: '103' })).rejects.toMatchObject({ code: 'CONFLICT', message: expect.stringContaining('recovery point p-1') as unknown })
  pin.release()
  await expect(deleteReplica(parts, { vmId: 102, confirm: '102' })).rejects.toMatchObject({ code: 'CONFLICT', context: { checkpoints: 3 } })
  expect((await states()).length).toBe(3)
  await site.expectExact(site.list())

  expect(await deleteReplica(parts, { vmId: 103, confirm: '103' })).toEqual({ siteId: SITE, checkpoints: 0 })
  expect(existsSync(site.vmDirectory('103'))).toBe(false)
  expect((await states()).map((text) => text.slice(0, 3))).toEqual(['101', '102'])
  await site.expectExact(site.list())
  // It may come again, and begins anew.
  await stray(site, '103')
  expect(site.registry.get(SITE, '103')?.store.epoch).toBe(1)
})

test('with its checkpoints a member can be deleted too, and with the last one the group is gone', async () => {
  await using directory = await memoryDirectory()
  await using site = await siteOf(directory.path)
  for (let n = 0; n < 3; n++) site.cut()
  await site.flush()
  await site.keeper.round()
  const parts = partsOf(site, new Set())
  expect(await deleteReplica(parts, { vmId: 102, confirm: '102', withCheckpoints: true })).toEqual({ siteId: SITE, checkpoints: 3 })
  expect(site.list()).toEqual([])
  expect(site.catalogue.listVpgs().map(({ name }) => name)).toEqual([VPG])
  await deleteReplica(parts, { vmId: 101, confirm: '101', withCheckpoints: true })
  expect(site.catalogue.listVpgs()).toEqual([])
  expect(site.keeper.group(SITE, VPG)).toBeUndefined()
  // Frames of a new life are not measured by the old one.
  const { store } = await site.registry.open(SITE, '101')
  expect({ epoch: store.epoch, durableSeq: store.durableSeq, seen: site.catalogue.seenSeq(SITE, '101') }).toEqual({ epoch: 0, durableSeq: 0, seen: 0 })
})

test('a member that is protected anew after its replica was deleted counts from the start: nothing of its first life is offered, read, or in its way', async () => {
  await using directory = await memoryDirectory()
  await using site = await RetentionSite.open({ directory: directory.path, sealer, random: new Random(5), limits: { segmentBytes: 1 << 20, segmentRecords: 32 } })
  await using points = await PointServer.listen({ socketPath: join(directory.path, 'points'), pins: site.pins })
  site.points = points
  const minutes = async (count: number): Promise<void> => {
    for (let n = 0; n < count; n++) {
      site.pass(60_000)
      site.cut({ writes: 4 })
      await site.flush()
      await site.keeper.round()
    }
  }
  const served = async (): Promise<Buffer[]> => {
    const opened = await points.openPoint({ pointId: 'p', vms: [{ vm: '102', vmDirectory: site.vmDirectory('102'), seq: site.list()[0].namedSeqs['102'] }] })
    const contents: Buffer[] = []
    for (const { exportName, sizeBytes } of opened.disks) {
      await using client = await NbdClient.connect({ path: join(directory.path, 'points') }, { exportName })
      contents.push(Buffer.from(await client.read(0, sizeBytes)))
    }
    await points.closePoint('p', { force: true })
    return contents
  }
  await minutes(70)
  expect(site.bases()[1]).toBeGreaterThan(1)
  const firstLife = await served()
  const parts = partsOf(site, new Set())
  await deleteReplica(parts, { vmId: 102, confirm: '102', withCheckpoints: true })
  const { oldest, clock } = site.group.state
  expect([oldest, ...clock.samples].flatMap((one) => Object.keys(one?.seqs ?? {})).filter((vm) => vm === '102')).toEqual([])
  const { store } = await site.registry.open(SITE, '102')
  await store.beginEpoch(GROUP_DISKS)
  store.accept(syncEndFrame(1))
  await store.flush()
  site.writes.set('102', [])
  site.seqs.set('102', 1)

  await minutes(3)
  expect(site.list().length).toBe(3)
  await site.expectExact(site.list())
  const secondLife = await served()
  expect(secondLife).not.toEqual(firstLife)
  // What is cached of the first life is not what a point shows.
  await using fresh = await PointServer.listen({ socketPath: join(directory.path, 'fresh') })
  const { disks } = await fresh.openPoint({ pointId: 'p', vms: [{ vm: '102', vmDirectory: site.vmDirectory('102'), seq: site.list()[0].namedSeqs['102'] }] })
  for (const [at, { exportName, sizeBytes }] of disks.entries()) {
    await using client = await NbdClient.connect({ path: join(directory.path, 'fresh') }, { exportName })
    expect(secondLife[at].equals(await client.read(0, sizeBytes))).toBe(true)
  }
  // And history goes on as that of a new member.
  await minutes(70)
  expect(site.group.alarms).toEqual([])
  expect(site.list().length).toBe(61)
  await site.expectExact(site.list())
}, 60_000)

test('a deletion that was cut off after its first step is finished when the agent starts', async () => {
  await using directory = await memoryDirectory()
  const site = await siteOf(directory.path)
  site.cut()
  await site.flush()
  expect(site.catalogue.seenSeq(SITE, '102')).toBeGreaterThan(0)
  const gone = join(directory.path, 'vms', '.removed', SITE, '102')
  await site[Symbol.asyncDispose]()
  await mkdir(dirname(gone), { recursive: true })
  await rename(site.vmDirectory('102'), gone)
  await using again = await siteOf(directory.path)
  expect(existsSync(gone)).toBe(false)
  expect(again.list()).toEqual([])
  // It was opened anew.
  expect(again.store('102').epoch).toBe(1)
})
