import { copyFile, open, writeFile } from 'node:fs/promises'
import { setTimeout as pause } from 'node:timers/promises'
import { describe, expect, test } from '@jest/globals'
import { startBareVm } from './bare-vm.ts'
import type { BareVm, VmShape } from './bare-vm.ts'
import { bootSector } from './boot-sector.ts'
import { ClusterNode } from './cluster-node.ts'
import { beginMigration, cancelMigration, migrationEnd, runState, startIncoming } from './live-migration.ts'
import type { Migrated, MigrationOptions } from './live-migration.ts'
import { ProtectedSite, oursIn } from './protected-site.ts'
import * as proxmox from './proxmox-commands.ts'

// Live migrations of a protected guest that writes without a pause: two real QEMU processes on the same disk files, a plugin of its own on each of two nodes,
// a real agent.

const MiB = 1024 * 1024
const SIZE_BYTES = 72 * MiB
const shapes: readonly VmShape[] = ['8.4', '9.x']
const startBusyVm = (shape: VmShape, diskCount = 1): Promise<BareVm> => startBareVm({ shape, sizeBytes: SIZE_BYTES, diskCount, bootSector: bootSector({}) })
const stopGuest = (vm: BareVm): Promise<unknown> => vm.qmp((qmp) => qmp.execute('stop'))

const eventually = async (done: () => Promise<boolean>): Promise<void> => {
  while (!(await done())) await pause(20)
}
const bitmapsIn = async (vm: BareVm): Promise<string[]> => (await oursIn(vm)).bitmaps.map(({ name }) => name).sort()

/** A write of QEMU's own where the guest never writes, so that no later write of his hides that it was missed. */
const writeBesideGuest = async (vm: BareVm, pattern: number): Promise<void> => {
  await vm.qmp((qmp) => qmp.execute('human-monitor-command', { 'command-line': `qemu-io drive-scsi0 "write -P ${pattern} 68M 64k"` }))
  await using file = await open(vm.disks[0].path, 'r')
  expect((await file.read(Buffer.alloc(512), 0, 512, 68 * MiB)).buffer).toEqual(Buffer.alloc(512, pattern))
}

/** What Proxmox does up to the moment in which the guest goes on: it locks the VM, starts the target, migrates, moves the configuration. */
const migrate = async (from: ClusterNode, to: ClusterNode, source: BareVm, target: BareVm & { uri: string }, options: MigrationOptions): Promise<Migrated> => {
  await from.configure('migrate')
  await from.until(({ is }) => is === 'suspended')
  // Proxmox starts the target now; what is handed over is there long before.
  await eventually(async () => (await bitmapsIn(source)).some((name) => name.startsWith('cdp-carried-')))
  expect((await oursIn(source)).parts).toEqual([])
  await writeBesideGuest(source, to.changes.length + 1)
  await beginMigration(source, target.uri, options)
  const end = await migrationEnd(source)
  if (end.status === 'completed') {
    await from.moveTo(to)
    await to.runs(target)
  }
  return end
}

const TAKEN_ALONG = { what: 'QEMU takes dirty bitmaps along, as on Proxmox: only what was written since is copied', dirtyBitmaps: true }
const LEFT_BEHIND = { what: 'QEMU leaves them behind: everything is copied again', dirtyBitmaps: false }

describe.each(shapes)('a busy guest in the shape of %s', (shape) => {
  test.each(shape === '9.x' ? [TAKEN_ALONG, LEFT_BEHIND] : [TAKEN_ALONG])('moves to another node and back; $what', async ({ dirtyBitmaps }) => {
    await using source = await startBusyVm(shape)
    await using target = await startIncoming(source)
    await using site = await ProtectedSite.start()
    await using a = await ClusterNode.make(site, 'a')
    await using b = await ClusterNode.make(site, 'b')
    await a.configure()
    await a.runs(source)
    a.protect(false)
    await a.untilStreaming()
    await stopGuest(source)
    const before = await a.vm.streamingWorker?.ask('cut', { c: site.clock.cut(), mark: { id: 'before', vpg: 'shop', vms: ['100'], atUnixMs: 1, kind: 'automatic' } })
    if (before === undefined || !('namedSeq' in before)) throw new Error(`no checkpoint: ${JSON.stringify(before)}`)
    await copyFile(source.disks[0].path, `${source.dir}/before.raw`)
    await source.qmp((qmp) => qmp.execute('cont'))
    await eventually(async () => ((await a.vm.streamingWorker?.ask('captured', {}))?.seq ?? 0) > before.namedSeq + 50)

    const there = await migrate(a, b, source, target, { dirtyBitmaps })
    expect(there).toMatchObject({ status: 'completed' })
    const resumedMs = performance.now()
    await target.qmp((qmp) => qmp.execute('cont'))
    b.protect(true)
    // The lock is still in the configuration: Proxmox takes it away last.
    await b.untilStreaming()
    console.log(`${shape}, ${dirtyBitmaps ? 'with' : 'without'} bitmaps: guest stopped for ${there.downtimeMs} ms, in step ${Math.round(performance.now() - resumedMs)} ms after it went on`)
    await a.letGo()
    await source.kill()
    await b.configure()
    expect(b.syncs).toEqual([dirtyBitmaps ? 'bitmap: the VM came to this node' : expect.stringMatching(/^full: the VM came to this node; .*; no bitmap says what changed$/)])
    expect((await bitmapsIn(target)).filter((name) => name.startsWith('cdp-carried-'))).toEqual([])

    // And back: what the first node remembers is of another QEMU.
    await eventually(async () => ((await b.vm.streamingWorker?.ask('captured', {}))?.bytes['scsi0'] ?? 0) > MiB)
    // The plugin there has to see once that the lock of the first one is gone.
    await pause(1000)
    await using back = await startIncoming(target)
    expect(await migrate(b, a, target, back, { dirtyBitmaps })).toMatchObject({ status: 'completed' })
    await back.qmp((qmp) => qmp.execute('cont'))
    a.changes.splice(0)
    a.protect(true)
    await a.untilStreaming()
    await b.letGo()
    await target.kill()
    await a.configure()
    expect(a.syncs).toEqual([dirtyBitmaps ? 'bitmap: the VM came to this node' : expect.stringMatching(/^full: the VM came to this node; .*; no bitmap says what changed$/)])
    await a.untilStreaming()
    await stopGuest(back)
    expect(await site.replicaEquals({ scsi0: back.disks[0].path }, 'raw', a.vm)).toEqual({ scsi0: true })
    expect(await site.pointEquals(before.namedSeq, { scsi0: `${source.dir}/before.raw` })).toEqual({ scsi0: true })
  }, 300_000)

  test('a migration that is cancelled: the source goes on in the same stream, with what its bitmaps hold', async () => {
    await using source = await startBusyVm(shape)
    await using target = await startIncoming(source)
    await using site = await ProtectedSite.start()
    await using a = await ClusterNode.make(site, 'a')
    await a.configure()
    await a.runs(source)
    a.protect(false)
    await a.untilStreaming()
    const { epoch } = site.store
    await a.configure('migrate')
    await a.until(({ is }) => is === 'suspended')
    await eventually(async () => (await bitmapsIn(source)).some((name) => name.startsWith('cdp-carried-')))
    await writeBesideGuest(source, 5)
    await beginMigration(source, target.uri, { dirtyBitmaps: true, maxBytesPerSec: 64 * 1024 })
    expect(await cancelMigration(source)).toMatchObject({ status: 'cancelled' })
    await a.configure()
    await a.untilStreaming()
    expect(a.syncs.slice(1)).toEqual(['bitmap: suspended, held by migration: Proxmox migrates the VM to another node'])
    expect(site.store.epoch).toBe(epoch)
    expect((await bitmapsIn(source)).filter((name) => name.startsWith('cdp-carried-'))).toEqual([])
    await stopGuest(source)
    expect(await site.replicaEquals({ scsi0: source.disks[0].path }, 'raw', a.vm)).toEqual({ scsi0: true })
  }, 240_000)

  test('a plugin that notices nothing of the migration: it stops when the other node takes over, and never takes the stream back', async () => {
    await using source = await startBusyVm(shape)
    await using target = await startIncoming(source)
    await using site = await ProtectedSite.start()
    await using a = await ClusterNode.make(site, 'a')
    await using b = await ClusterNode.make(site, 'b')
    await a.configure()
    await a.runs(source)
    a.protect(false)
    await a.untilStreaming()
    await beginMigration(source, target.uri, { dirtyBitmaps: false })
    expect(await migrationEnd(source)).toMatchObject({ status: 'completed' })
    await b.configure()
    await b.runs(target)
    await target.qmp((qmp) => qmp.execute('cont'))
    b.protect(true)
    await b.untilStreaming()
    await a.until(({ is }) => is !== 'streaming')
    const { epoch } = site.store
    // Two tries of the late one, and none of them asks the agent.
    for (let tries = 0; tries < 2; tries++) {
      await a.until(({ is }) => is === 'attaching')
      await a.until(({ is }) => is !== 'attaching')
    }
    expect(a.state.why).toContain('a migration of the VM is not over: its QEMU is in the state postmigrate')
    expect([site.store.epoch, b.state.is, await runState(source)]).toEqual([epoch, 'streaming', 'postmigrate'])
    await stopGuest(target)
    expect(await site.replicaEquals({ scsi0: target.disks[0].path }, 'raw', b.vm)).toEqual({ scsi0: true })
  }, 240_000)

  test('a disk that came back before the move keeps its number on a node that has never seen it, and joins there if it has not yet', async () => {
    await using source = await startBusyVm(shape, 2)
    await using site = await ProtectedSite.start({ proofEveryMs: 300 })
    await using a = await ClusterNode.make(site, 'a')
    await using b = await ClusterNode.make(site, 'b')
    await a.configure()
    await a.runs(source)
    a.protect(false)
    await a.untilStreaming()
    await a.vm.suspend({ owner: 'qm', reason: 'unplug of scsi1', forMs: 60_000 })
    await proxmox.unplug(source, 'scsi1')
    await a.vm.resume('qm')
    await eventually(async () => site.store.disks.length === 1)
    await a.untilStreaming()
    await proxmox.plug(source, 'scsi1', source.disks[1].path, 16 * MiB, (path) => writeFile(path, Buffer.alloc(16 * MiB, 3)))
    await eventually(async () => site.store.disks.length === 2 && a.state.is === 'streaming')
    const numbers = [{ disk: 0, key: 'scsi0', sizeBytes: SIZE_BYTES }, { disk: 2, key: 'scsi1', sizeBytes: 16 * MiB }]
    await a.letGo()
    expect(site.store.disks).toMatchObject(numbers)
    await b.configure()
    await b.runs(source)
    b.protect(true)
    await b.untilStreaming()
    await site.untilJoined(b.vm)
    expect(site.store.disks).toEqual(numbers)
    await stopGuest(source)
    expect(await site.replicaEquals({ scsi0: source.disks[0].path, scsi1: source.disks[1].path }, 'raw', b.vm)).toEqual({ scsi0: true, scsi1: true })
  }, 240_000)
})
