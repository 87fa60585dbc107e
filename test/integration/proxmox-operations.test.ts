import { describe, expect, test } from '@jest/globals'
import { startBareVm } from './bare-vm.ts'
import type { BareVm, VmShape } from './bare-vm.ts'
import { bootSector } from './boot-sector.ts'
import { ProtectedSite, oursIn } from './protected-site.ts'
import * as proxmox from './proxmox-commands.ts'

// Proxmox works as if we were not there: its own operations on a protected VM whose guest writes without a pause (platform-facts, "What the job does
// to Proxmox's own operations"), around them a suspension where they need one, beside the running capture where they do not.

const MiB = 1024 * 1024
const SIZE_BYTES = 72 * MiB
const shapes: readonly VmShape[] = ['8.4', '9.x']
const busy = { sizeBytes: SIZE_BYTES, bootSector: bootSector({}) }

/** Stands for the bracket around an operation of Proxmox. */
const bracketed = async (site: ProtectedSite, reason: string, work: () => Promise<unknown>): Promise<void> => {
  await site.vm.suspend({ owner: 'qm', reason, forMs: 60_000 })
  try {
    await work()
  } finally {
    await site.vm.resume('qm')
  }
}

type Disks = { files: Record<string, string>; format?: 'raw' | 'qcow2' }

/** In step again by itself; a checkpoint can be cut; and with the guest at rest the replica is the source. Then the guest goes on. */
const isWhole = async (vm: BareVm, site: ProtectedSite, { files, format = 'raw' }: Disks): Promise<void> => {
  await site.until(() => site.state === 'streaming')
  expect(await site.cut(`c${site.changes.length}-${performance.now()}`)).toBe(true)
  await vm.qmp((qmp) => qmp.execute('stop'))
  await site.until(() => site.state === 'streaming')
  expect(await site.replicaEquals(files, format)).toEqual(Object.fromEntries(Object.keys(files).map((key) => [key, true])))
  await vm.qmp((qmp) => qmp.execute('cont'))
}
const kindsSince = (site: ProtectedSite, from: number): string[] => site.changes.slice(from).flatMap((state) => (state.is === 'syncing' ? [state.kind] : []))
const moved = (vm: BareVm, name: string): string => `${vm.dir}/${name}.raw`

describe.each(shapes)('in the shape of %s, suspended', (shape) => {
  test('a snapshot inside the image, and its deletion', async () => {
    await using vm = await startBareVm({ ...busy, shape, format: 'qcow2' })
    await using site = await ProtectedSite.start()
    await site.inStep(vm)
    await site.untilCaptured()
    const disks = { files: { scsi0: vm.disks[0].path }, format: 'qcow2' as const }
    const from = site.changes.length
    await bracketed(site, 'snapshot', () => proxmox.snapshot(vm, 'scsi0', 'before'))
    await isWhole(vm, site, disks)
    await bracketed(site, 'delsnapshot', () => proxmox.deleteSnapshot(vm, 'scsi0', 'before'))
    await isWhole(vm, site, disks)
    expect(kindsSince(site, from)).toEqual(['bitmap', 'bitmap'])
  }, 120_000)

  test('a resize, which the replica follows without a full copy; a disk move; a full clone', async () => {
    await using vm = await startBareVm({ ...busy, shape })
    await using site = await ProtectedSite.start()
    await site.inStep(vm)
    await site.untilCaptured()
    const { epoch } = site.store
    let from = site.changes.length
    await bracketed(site, 'resize', () => proxmox.resize(vm, 'scsi0', SIZE_BYTES + 8 * MiB))
    await isWhole(vm, site, { files: { scsi0: vm.disks[0].path } })
    expect(kindsSince(site, from)).toEqual(['bitmap'])
    expect([site.store.disks, site.store.epoch]).toEqual([[{ disk: 0, key: 'scsi0', sizeBytes: SIZE_BYTES + 8 * MiB }], epoch])

    from = site.changes.length
    await bracketed(site, 'move', () => proxmox.moveDisk(vm, 'scsi0', moved(vm, 'moved'), SIZE_BYTES + 8 * MiB))
    await isWhole(vm, site, { files: { scsi0: moved(vm, 'moved') } })
    // The bitmap is on the throttle node that stays on 9.x, on the node that goes on 8.4.
    expect(kindsSince(site, from)).toEqual([shape === '8.4' ? 'full' : 'bitmap'])

    from = site.changes.length
    await bracketed(site, 'clone', () => proxmox.cloneDisk(vm, 'scsi0', moved(vm, 'cloned'), SIZE_BYTES + 8 * MiB))
    await isWhole(vm, site, { files: { scsi0: moved(vm, 'moved') } })
    expect(kindsSince(site, from)).toEqual(['bitmap'])
  }, 120_000)

  test('hot-unplug and hot-plug of a disk: its records stay, the others stay protected, the new one is copied whole', async () => {
    await using vm = await startBareVm({ ...busy, shape, diskCount: 2 })
    await using site = await ProtectedSite.start()
    await site.inStep(vm)
    await site.untilCaptured()
    const from = site.changes.length
    await bracketed(site, 'unplug', () => proxmox.unplug(vm, 'scsi1'))
    await isWhole(vm, site, { files: { scsi0: vm.disks[0].path } })
    expect(site.store.disks.map(({ disk, key }) => `${key}=${disk}`)).toEqual(['scsi0=0'])
    // Nobody tells us of a new one.
    await proxmox.plug(vm, 'scsi1', moved(vm, 'fresh'), 16 * MiB)
    await site.until(() => site.changes.some(({ why }) => why.includes('scsi1 added')))
    await site.untilJoined()
    await isWhole(vm, site, { files: { scsi0: vm.disks[0].path, scsi1: moved(vm, 'fresh') } })
    expect(site.store.disks.map(({ disk, key }) => `${key}=${disk}`)).toEqual(['scsi0=0', 'scsi1=2'])
    expect(kindsSince(site, from)).toEqual(['bitmap', 'bitmap'])
  }, 120_000)
})

describe('beside the running capture', () => {
  const undisturbed = async (vm: BareVm, site: ProtectedSite, disks: Disks, work: () => Promise<unknown>): Promise<void> => {
    const from = site.changes.length
    await work()
    await isWhole(vm, site, disks)
    // Longer than a look at the counters takes to come.
    await new Promise((resolve) => setTimeout(resolve, 700))
    expect(site.changes.slice(from).map(({ is, why }) => `${is}: ${why}`)).toEqual([])
  }

  test.each(shapes)('%s: backup, reset, pause and resume, another throttle', async (shape) => {
    await using vm = await startBareVm({ ...busy, shape })
    await using site = await ProtectedSite.start({ proofEveryMs: 300 })
    await site.inStep(vm)
    await site.untilCaptured()
    const disks = { files: { scsi0: vm.disks[0].path } }
    await undisturbed(vm, site, disks, async () => (await proxmox.startBackup(vm, 'scsi0', { sizeBytes: SIZE_BYTES })).done())
    await undisturbed(vm, site, disks, async () => {
      const backup = await proxmox.startBackup(vm, 'scsi0', { sizeBytes: SIZE_BYTES, bytesPerSec: MiB })
      expect(await site.cut('during a backup')).toBe(true)
      await new Promise((resolve) => setTimeout(resolve, 700))
      await backup.end()
    })
    await undisturbed(vm, site, disks, () => vm.qmp((qmp) => qmp.execute('system_reset')))
    await undisturbed(vm, site, disks, () => vm.qmp(async (qmp) => {
      await qmp.execute('stop')
      await qmp.execute('cont')
    }))
    await undisturbed(vm, site, disks, () => proxmox.throttle(vm, 'scsi0', 20 * MiB))
  }, 120_000)

  test('8.4, by the shield: snapshot, its deletion, a full clone', async () => {
    await using vm = await startBareVm({ ...busy, shape: '8.4', format: 'qcow2' })
    await using site = await ProtectedSite.start({ proofEveryMs: 300 })
    await site.inStep(vm)
    await site.untilCaptured()
    const disks = { files: { scsi0: vm.disks[0].path }, format: 'qcow2' as const }
    await undisturbed(vm, site, disks, () => proxmox.snapshot(vm, 'scsi0', 'before'))
    await undisturbed(vm, site, disks, () => proxmox.deleteSnapshot(vm, 'scsi0', 'before'))
    await undisturbed(vm, site, disks, () => proxmox.cloneDisk(vm, 'scsi0', moved(vm, 'cloned'), SIZE_BYTES))
  }, 120_000)

  test('9.x: capture is suspended and resumed while a backup runs; 8.4: that is refused, and nothing changes', async () => {
    for (const shape of shapes) {
      await using vm = await startBareVm({ ...busy, shape })
      await using site = await ProtectedSite.start()
      await site.inStep(vm)
      await site.untilCaptured()
      const backup = await proxmox.startBackup(vm, 'scsi0', { sizeBytes: SIZE_BYTES, bytesPerSec: MiB })
      const from = site.changes.length
      const suspended = site.vm.suspend({ owner: 'qm', reason: 'resize', forMs: 60_000 })
      if (shape === '8.4') {
        await expect(suspended).rejects.toMatchObject({ code: 'CONFLICT', retry: true })
        expect([site.changes.length - from, site.vm.holds]).toEqual([0, []])
      } else {
        await suspended
        expect((await oursIn(vm)).parts).toEqual([])
        await site.vm.resume('qm')
        await site.next('streaming', from)
      }
      await isWhole(vm, site, { files: { scsi0: vm.disks[0].path } })
      await backup.end()
      await isWhole(vm, site, { files: { scsi0: vm.disks[0].path } })
    }
  }, 120_000)

  test('8.4: a VM that is being backed up waits for the end of the backup and is protected then', async () => {
    await using vm = await startBareVm({ ...busy, shape: '8.4' })
    await using site = await ProtectedSite.start()
    const backup = await proxmox.startBackup(vm, 'scsi0', { sizeBytes: SIZE_BYTES, bytesPerSec: MiB })
    await site.runs(vm)
    site.vm.start()
    await site.until(() => site.vm.state.why.startsWith('waits for the end of a backup'))
    expect((await oursIn(vm)).parts).toEqual([])
    await backup.end()
    await isWhole(vm, site, { files: { scsi0: vm.disks[0].path } })
  }, 120_000)

  test('8.4: a disk move beside the shield orphans the job: found within 10 s though the guest is idle, and mended by a full copy', async () => {
    await using vm = await startBareVm({ ...busy, shape: '8.4' })
    await using site = await ProtectedSite.start({ proofEveryMs: 5000 })
    await site.inStep(vm)
    await site.untilCaptured()
    await vm.qmp((qmp) => qmp.execute('stop'))
    await proxmox.moveDisk(vm, 'scsi0', moved(vm, 'moved'), SIZE_BYTES)
    const from = site.changes.length
    const startMs = performance.now()
    const lost = await site.next('tracking', from)
    expect(performance.now() - startMs).toBeLessThan(10_000)
    expect(lost.why).toContain("the guest's writes do not pass capture any more")
    await vm.qmp((qmp) => qmp.execute('cont'))
    await site.next('streaming', from)
    expect(kindsSince(site, from)).toEqual(['full'])
    await isWhole(vm, site, { files: { scsi0: moved(vm, 'moved') } })
  }, 120_000)
})
