import { describe, expect, test } from '@jest/globals'
import { bootSector } from './boot-sector.ts'
import { startBareVm } from './bare-vm.ts'
import type { BareVm, VmShape } from './bare-vm.ts'
import { ProtectedSite, oursIn } from './protected-site.ts'

// Suspending and resuming capture of a guest that writes without a pause, with real QEMU processes and a real agent.

const MiB = 1024 * 1024
const SIZE_BYTES = 72 * MiB
const CYCLES = 12
const shapes: readonly VmShape[] = ['8.4', '9.x']
const qm = { owner: 'qm', reason: 'resize of scsi0', forMs: 60_000 }
const startBusyVm = (shape: VmShape): Promise<BareVm> => startBareVm({ shape, sizeBytes: SIZE_BYTES, bootSector: bootSector({}) })
const stopGuest = (vm: BareVm): Promise<unknown> => vm.qmp((qmp) => qmp.execute('stop'))
const median = (values: readonly number[]): number => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]

describe.each(shapes)('a busy guest in the shape of %s', (shape) => {
  test('suspended, nothing of ours but the bitmap is in QEMU and no checkpoint is cut; resumed, it comes into step by a bitmap sync, and nothing is missed', async () => {
    await using vm = await startBusyVm(shape)
    await using site = await ProtectedSite.start()
    await site.inStep(vm)
    await site.untilCaptured()
    expect(await site.cut('before')).toBe(true)
    const { epoch } = site.store
    const detachMs: number[] = []
    const attachMs: number[] = []
    for (let cycle = 0; cycle < CYCLES; cycle++) {
      const from = site.changes.length
      const worker = site.vm.streamingWorker
      let startMs = performance.now()
      await site.vm.suspend(qm)
      detachMs.push(performance.now() - startMs)
      const ours = await oursIn(vm)
      expect(ours.parts).toEqual([])
      expect(ours.bitmaps.some(({ recording }) => recording)).toBe(true)
      expect(site.vm.state).toMatchObject({ is: 'suspended', why: 'held by qm: resize of scsi0' })
      expect(await worker?.ask('cut', { c: site.clock.cut(), mark: { id: 'x', vpg: 'shop', vms: ['100'], atUnixMs: 1, kind: 'automatic' } })).toMatchObject({ refused: expect.any(String) })
      startMs = performance.now()
      expect(await site.vm.resume('qm')).toBe(true)
      const syncing = await site.next('syncing', from)
      attachMs.push(performance.now() - startMs)
      expect(syncing).toMatchObject({ kind: 'bitmap', why: 'suspended, held by qm: resize of scsi0' })
      await site.next('streaming', from)
      // No state but these on the way: no worker was started anew, nothing failed.
      expect(site.changes.slice(from).map(({ is }) => is)).toEqual(['suspended', 'attaching', 'syncing', 'streaming'])
      expect(await site.cut(`after ${cycle}`)).toBe(true)
    }
    const both = detachMs.map((ms, cycle) => ms + attachMs[cycle])
    console.log(`${shape}: detach ${median(detachMs).toFixed(0)} ms, attach ${median(attachMs).toFixed(0)} ms, both ${median(both).toFixed(0)} ms (worst ${Math.max(...both).toFixed(0)})`)
    expect(median(both)).toBeLessThan(400)
    expect(site.store.epoch).toBe(epoch)
    await stopGuest(vm)
    expect(await site.replicaEquals({ scsi0: vm.disks[0].path })).toEqual({ scsi0: true })
  }, 120_000)

  test('held by two, it is resumed when the last one lets go, or at his limit', async () => {
    await using vm = await startBusyVm(shape)
    await using site = await ProtectedSite.start()
    await site.inStep(vm)
    await site.untilCaptured()
    await Promise.all([site.vm.suspend(qm), site.vm.suspend({ owner: 'ann', reason: 'storage', forMs: 60_000 })])
    await site.vm.suspend({ ...qm, reason: 'move' })
    expect(site.vm.holds.map(({ owner, reason }) => `${owner} ${reason}`).sort()).toEqual(['ann storage', 'qm move'])
    await site.vm.resume('qm')
    expect([site.state, await site.vm.resume('qm'), await site.vm.resume('bob')]).toEqual(['suspended', false, false])
    await site.vm.suspend({ owner: 'ann', reason: 'storage', forMs: 300 })
    await site.next('streaming')
    expect(site.vm.holds).toEqual([])
    await stopGuest(vm)
    expect(await site.replicaEquals({ scsi0: vm.disks[0].path })).toEqual({ scsi0: true })
  }, 120_000)

  test('a hold that is asked for again while QEMU does not answer is kept: what is done under it goes on, and nothing attaches', async () => {
    await using vm = await startBusyVm(shape)
    await using site = await ProtectedSite.start()
    await site.inStep(vm)
    await site.vm.suspend(qm)
    const from = site.changes.length
    process.kill(vm.pid, 'SIGSTOP')
    try {
      await expect(site.vm.suspend({ ...qm, reason: 'move' })).rejects.toMatchObject({ code: 'TIMEOUT' })
    } finally {
      process.kill(vm.pid, 'SIGCONT')
    }
    expect([site.state, site.vm.holds.map(({ owner }) => owner)]).toEqual(['suspended', ['qm']])
    expect(await site.vm.suspend(qm)).toMatchObject({ owner: 'qm' })
    expect(site.changes.slice(from).filter(({ is }) => is !== 'suspended')).toEqual([])
    expect((await oursIn(vm)).parts).toEqual([])
    await site.vm.resume('qm')
    await site.next('streaming', from)
    await stopGuest(vm)
    expect(await site.replicaEquals({ scsi0: vm.disks[0].path })).toEqual({ scsi0: true })
  }, 120_000)

  test('a plugin that is killed leaves the hold: the next one takes out what is left, waits, and resumes at the limit or when it is told to', async () => {
    await using vm = await startBusyVm(shape)
    await using site = await ProtectedSite.start()
    await site.runs(vm)
    await using first = site.keeper()
    await first.until('streaming')
    // Killed with the hold on disk and the job in QEMU, at whatever moment in between.
    const asked = first.ask({ suspend: qm })
    await first.until('suspended')
    await first.kill()
    await using second = site.keeper()
    await second.until('suspended')
    expect(second.states.map(({ is }) => is)).toEqual(['suspended'])
    expect(await second.ask({ suspend: { ...qm, owner: 'ann', forMs: 2000 } })).toMatchObject({ owner: 'ann' })
    expect((await oursIn(vm)).parts).toEqual([])
    expect(await second.ask({ resume: 'qm' })).toBe(true)
    expect(second.state).toBe('suspended')
    await second.kill()
    site.vm.start()
    await site.until(() => site.state === 'streaming')
    expect(site.changes.map(({ is }) => is)).toEqual(['suspended', 'attaching', 'syncing', 'streaming'])
    expect(site.changes[2]).toMatchObject({ kind: 'bitmap', why: 'the plugin was started again' })
    await stopGuest(vm)
    expect(await site.replicaEquals({ scsi0: vm.disks[0].path })).toEqual({ scsi0: true })
    void asked
  }, 120_000)
})
