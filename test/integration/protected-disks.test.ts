import { once } from 'node:events'
import { open, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import type { AddressInfo, Socket } from 'node:net'
import { describe, expect, test } from '@jest/globals'
import { Line } from '../kit/line.ts'
import { startBareVm } from './bare-vm.ts'
import type { BareVm, VmShape } from './bare-vm.ts'
import { bootSector } from './boot-sector.ts'
import { Keeper, ProtectedSite, oursIn } from './protected-site.ts'
import * as proxmox from './proxmox-commands.ts'

// Disks of a protected VM that come, go, grow and fail while others are written to; and a plugin that is killed in the middle of that.

const MiB = 1024 * 1024
const SIZE_BYTES = 72 * MiB
const shapes: readonly VmShape[] = ['8.4', '9.x']
const busy = { sizeBytes: SIZE_BYTES, bootSector: bootSector({}) }
const fresh = (vm: BareVm): string => `${vm.dir}/fresh.raw`

const restsEqual = async (vm: BareVm, site: ProtectedSite, files: Record<string, string>): Promise<void> => {
  await site.until(() => site.state === 'streaming')
  await vm.qmp((qmp) => qmp.execute('stop'))
  expect(await site.replicaEquals(files)).toEqual(Object.fromEntries(Object.keys(files).map((key) => [key, true])))
}
const joiningIn = (site: ProtectedSite): string[] => site.store.disks.filter(({ joining }) => joining).map(({ key }) => key)
const pause = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 10))
const kindsOf = (states: readonly { is: string; kind?: string }[]): (string | undefined)[] => states.filter(({ is }) => is === 'syncing').map(({ kind }) => kind)

describe.each(shapes)('in the shape of %s', (shape) => {
  test('a disk that came is copied whole, also by a plugin that takes over from one that was killed in the middle of it', async () => {
    await using vm = await startBareVm({ ...busy, shape, diskCount: 2 })
    await using site = await ProtectedSite.start({ proofEveryMs: 300, syncRateBytesPerSec: 8 * MiB })
    await proxmox.unplug(vm, 'scsi1')
    await site.runs(vm)
    await using plugin = site.keeper()
    await plugin.until('streaming')
    const from = plugin.states.length
    await proxmox.plug(vm, 'scsi1', fresh(vm), 16 * MiB, (path) => writeFile(path, Buffer.alloc(16 * MiB, 7)))
    while (!plugin.states.slice(from).some(({ is, why }) => is === 'syncing' && why.includes('scsi1 added'))) await plugin.next()
    await plugin.until('streaming')
    const { durableSeq } = site.store
    while (site.store.durableSeq < durableSeq + 2) await pause()
    await plugin.kill()
    expect(joiningIn(site)).toEqual(['scsi1'])
    site.vm.start()
    await site.until(() => site.state === 'streaming')
    expect(site.vm.joining?.keys).toEqual(['scsi1'])
    await site.untilJoined()
    await restsEqual(vm, site, { scsi0: vm.disks[0].path, scsi1: fresh(vm) })
    expect(kindsOf(site.changes)).toEqual(['bitmap'])
  }, 120_000)

  test('the new part of a disk that grew is copied whole, also by a plugin that takes over from one that was killed in the middle of it', async () => {
    await using vm = await startBareVm({ ...busy, shape })
    await using site = await ProtectedSite.start({ syncRateBytesPerSec: 8 * MiB })
    await site.runs(vm)
    await using plugin = site.keeper()
    await plugin.until('streaming')
    await plugin.ask({ suspend: { owner: 'qm', reason: 'resize', forMs: 60_000 } })
    await proxmox.resize(vm, 'scsi0', SIZE_BYTES + 16 * MiB)
    {
      // What a volume held before it became a part of this one: no bitmap knows of it.
      await using file = await open(vm.disks[0].path, 'r+')
      await file.write(Buffer.alloc(16 * MiB, 9), 0, 16 * MiB, SIZE_BYTES)
    }
    const from = plugin.states.length
    await plugin.ask({ resume: 'qm' })
    while (!plugin.states.slice(from).some(({ is }) => is === 'syncing')) await plugin.next()
    await plugin.kill()
    site.vm.start()
    await restsEqual(vm, site, { scsi0: vm.disks[0].path })
    expect(kindsOf(site.changes)).toEqual(['bitmap'])
    expect(site.store.disks).toEqual([{ disk: 0, key: 'scsi0', sizeBytes: SIZE_BYTES + 16 * MiB }])
  }, 120_000)

  test('a disk that is unplugged without a word is noticed, what is left of its capture is taken away, and the others go on', async () => {
    await using vm = await startBareVm({ ...busy, shape, diskCount: 2 })
    await using site = await ProtectedSite.start({ proofEveryMs: 300 })
    await site.inStep(vm)
    const from = site.changes.length
    await vm.qmp(async (qmp) => {
      await qmp.execute('device_del', { id: 'scsi1' })
      await qmp.waitForEvent((event) => event.event === 'DEVICE_DELETED' && event.data['device'] === 'scsi1', { deadlineMs: 10_000 })
    })
    expect((await site.next('attaching', from)).why).toBe('disk scsi1 removed')
    await site.next('streaming', from)
    expect(site.changes.slice(from).map(({ is, why }) => (is === 'tracking' ? `${is}: ${why}` : is))).toEqual(['attaching', 'syncing', 'streaming'])
    expect((await oursIn(vm)).parts.filter((name) => name.endsWith('scsi1'))).toEqual([])
    if (shape === '9.x') await vm.qmp((qmp) => qmp.execute('blockdev-del', { 'node-name': 'drive-scsi1' }))
    await restsEqual(vm, site, { scsi0: vm.disks[0].path })
  }, 120_000)

  test('a disk that comes while the line is cut waits for it: what was captured before is history that no bitmap brings back', async () => {
    await using vm = await startBareVm({ ...busy, shape, diskCount: 2 })
    await using site = await ProtectedSite.start({ proofEveryMs: 300 })
    await using line = await Line.to(site.vmOptions.agent.port)
    Object.assign(site.vmOptions.agent, { port: line.port })
    await using plugin = site.another()
    await proxmox.unplug(vm, 'scsi1')
    await site.runs(vm)
    plugin.start()
    await site.until(() => plugin.state.is === 'streaming')
    await line.cut()
    const mark = { id: 'cut-off', vpg: 'shop', vms: ['100'], atUnixMs: Date.now(), kind: 'automatic' as const }
    expect(await plugin.streamingWorker?.ask('cut', { c: site.clock.cut(), mark })).toHaveProperty('namedSeq')
    const from = site.changes.length
    await proxmox.plug(vm, 'scsi1', fresh(vm), 16 * MiB, (path) => writeFile(path, Buffer.alloc(16 * MiB, 7)))
    expect((await site.next('tracking', from)).why).toMatch(/the link is down; [0-9]+ bytes of captured history wait for it/)
    expect(site.catalogue.find('site-a', 'shop', 'cut-off')).toBeUndefined()
    await line.mend()
    await site.until(() => plugin.state.is === 'streaming')
    await site.untilJoined(plugin)
    expect(site.catalogue.find('site-a', 'shop', 'cut-off')?.state).toMatch(/^(valid|proved)$/)
    expect(kindsOf(site.changes.slice(from))).toEqual(['bitmap'])
    await vm.qmp((qmp) => qmp.execute('stop'))
    expect(await site.replicaEquals({ scsi0: vm.disks[0].path, scsi1: fresh(vm) }, 'raw', plugin)).toEqual({ scsi0: true, scsi1: true })
  }, 120_000)

  test('an agent that accepts and says nothing does not hold up a suspension', async () => {
    const sockets: Socket[] = []
    const mute = createServer((socket) => void sockets.push(socket)).listen(0, '127.0.0.1')
    await once(mute, 'listening')
    try {
      await using vm = await startBareVm({ ...busy, shape })
      await using site = await ProtectedSite.start()
      await site.runs(vm)
      await using plugin = new Keeper({ ...site.vmOptions, agent: { ...site.vmOptions.agent, port: (mute.address() as AddressInfo).port } })
      await plugin.until('attaching')
      await once(mute, 'connection')
      const startMs = performance.now()
      expect(await plugin.ask({ suspend: { owner: 'qm', reason: 'resize', forMs: 60_000 } })).toMatchObject({ owner: 'qm' })
      expect(performance.now() - startMs).toBeLessThan(2500)
      expect(plugin.state).toBe('suspended')
    } finally {
      for (const socket of sockets) socket.destroy()
      mute.close()
    }
  }, 120_000)
})

test('a write that failed at the source, of which nobody knows what is on the disk now, leads to a sync of what the bitmaps hold', async () => {
  await using vm = await startBareVm({ ...busy, shape: '8.4', failsOnceAtSector: 4096, extraArgs: ['-S'] })
  await using site = await ProtectedSite.start({ proofEveryMs: 300, rotateEveryMs: 200 })
  await site.inStep(vm)
  const from = site.changes.length
  await vm.qmp((qmp) => qmp.execute('cont'))
  expect((await site.next('tracking', from)).why).toBe('scsi0: a write of the guest failed at the source')
  await site.next('streaming', from)
  expect(kindsOf(site.changes.slice(from))).toEqual(['bitmap'])
  await restsEqual(vm, site, { scsi0: vm.disks[0].path })
}, 120_000)
