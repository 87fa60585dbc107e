import { randomBytes } from 'node:crypto'
import { writeFile } from 'node:fs/promises'
import { describe, expect, test } from '@jest/globals'
import { startBareVm } from './bare-vm.ts'
import type { BareVm, VmShape } from './bare-vm.ts'
import { bootSector } from './boot-sector.ts'
import { ProtectedSite } from './protected-site.ts'
import * as proxmox from './proxmox-commands.ts'

// A disk that came to a protected VM is copied beside the checkpoints of the others, and belongs to them once all of it is at the recovery site.

const MiB = 1024 * 1024
const NEW_BYTES = 24 * MiB
const SLOW = 6 * MiB
const shapes: readonly VmShape[] = ['8.4', '9.x']
const busy = { sizeBytes: 72 * MiB, bootSector: bootSector({}), diskCount: 2 }
const fresh = (vm: BareVm): string => `${vm.dir}/fresh.raw`
const plugFresh = (vm: BareVm): Promise<void> => proxmox.plug(vm, 'scsi1', fresh(vm), NEW_BYTES, (path) => writeFile(path, Buffer.alloc(NEW_BYTES, 7)))
const pause = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 10))

/** A VM in step that had a second disk until now. */
const withOneDisk = async (vm: BareVm, site: ProtectedSite): Promise<void> => {
  await proxmox.unplug(vm, 'scsi1')
  await site.inStep(vm)
}
/** The copy of the new disk is under way, and has not come to its end. */
const joins = async (site: ProtectedSite, doneBytes = 1): Promise<void> => {
  while ((site.vm.joining?.doneBytes ?? 0) < doneBytes) await pause()
}
/** Cuts a checkpoint that has to come about. @returns its sequence, and the disks that it shows */
const cut = async (site: ProtectedSite, id: string): Promise<{ seq: number; keys: string[] }> => {
  expect([id, await site.cut(id)]).toEqual([id, true])
  for (;;) {
    const found = site.catalogue.find('site-a', 'shop', id)
    if (found !== undefined && found.state !== 'pending') return { seq: found.namedSeqs['100'], keys: site.store.disksAt(found.namedSeqs['100']).map(({ key }) => key) }
    await pause()
  }
}
const restsEqual = async (vm: BareVm, site: ProtectedSite): Promise<void> => {
  await vm.qmp((qmp) => qmp.execute('stop'))
  expect(await site.replicaEquals({ scsi0: vm.disks[0].path, scsi1: fresh(vm) })).toEqual({ scsi0: true, scsi1: true })
}

describe.each(shapes)('in the shape of %s', (shape) => {
  test('checkpoints go on beside its copy and lack it; from its end on they have it', async () => {
    await using vm = await startBareVm({ ...busy, shape })
    await using site = await ProtectedSite.start({ proofEveryMs: 300, rotateEveryMs: 200, syncRateBytesPerSec: SLOW })
    await withOneDisk(vm, site)
    expect((await cut(site, 'before')).keys).toEqual(['scsi0'])
    await plugFresh(vm)
    for (const [id, doneBytes] of [['early', 1], ['later', 4 * MiB], ['late', 12 * MiB]] as const) {
      await joins(site, doneBytes)
      expect((await cut(site, id)).keys).toEqual(['scsi0'])
    }
    expect(site.vm.joining).toMatchObject({ keys: ['scsi1'], totalBytes: NEW_BYTES })
    await site.untilJoined()
    expect((await cut(site, 'whole')).keys).toEqual(['scsi0', 'scsi1'])
    await restsEqual(vm, site)
  }, 120_000)

  test('a suspension in the middle of its copy is not held up; the copy begins again with the attach that follows', async () => {
    await using vm = await startBareVm({ ...busy, shape })
    await using site = await ProtectedSite.start({ proofEveryMs: 300, syncRateBytesPerSec: SLOW, ...(shape === '9.x' ? { compares: true } : {}) })
    await withOneDisk(vm, site)
    await plugFresh(vm)
    await joins(site, 2 * MiB)
    const startMs = performance.now()
    await site.vm.suspend({ owner: 'qm', reason: 'snapshot', forMs: 60_000 })
    expect(performance.now() - startMs).toBeLessThan(2_500)
    const from = site.changes.length
    await site.vm.resume('qm')
    await site.next('streaming', from)
    await joins(site)
    expect((await cut(site, 'again')).keys).toEqual(['scsi0'])
    await site.untilJoined()
    expect((await cut(site, 'whole')).keys).toEqual(['scsi0', 'scsi1'])
    await restsEqual(vm, site)
  }, 120_000)
})

test('of a guest that writes nothing, too, the next checkpoint after its copy has it', async () => {
  await using vm = await startBareVm({ ...busy, shape: '9.x', extraArgs: ['-S'] })
  await using site = await ProtectedSite.start({ proofEveryMs: 300 })
  await withOneDisk(vm, site)
  await plugFresh(vm)
  while (!site.store.disks.some(({ key }) => key === 'scsi1')) await pause()
  await site.untilJoined()
  expect((await cut(site, 'quiet')).keys).toEqual(['scsi0', 'scsi1'])
  expect(await site.replicaEquals({ scsi1: fresh(vm) })).toEqual({ scsi1: true })
}, 120_000)

test('a comparison of everything goes first, and leaves it to join again; a verify has to wait', async () => {
  await using vm = await startBareVm({ ...busy, shape: '9.x' })
  await using site = await ProtectedSite.start({ proofEveryMs: 300, syncRateBytesPerSec: SLOW, compares: true })
  await withOneDisk(vm, site)
  await plugFresh(vm)
  await joins(site, 2 * MiB)
  await expect(site.vm.verify()).rejects.toThrow('scsi1 of VM 100 is being copied for the first time')
  const from = site.changes.length
  site.vm.forceSync('forced by an operator')
  await site.next('streaming', from)
  expect(site.changes.slice(from).map(({ is, why }) => `${is}: ${why}`)).toEqual(['syncing: forced by an operator', expect.stringMatching(/^streaming: delta sync complete/)])
  await joins(site)
  expect((await cut(site, 'again')).keys).toEqual(['scsi0'])
  await site.untilJoined()
  await restsEqual(vm, site)
}, 120_000)

test('a new disk that cannot be read takes nothing down: the VM stays in step, another new one joins, it says why, and tries again', async () => {
  await using vm = await startBareVm({ ...busy, shape: '8.4', diskCount: 3 })
  await using site = await ProtectedSite.start({ proofEveryMs: 300 })
  await proxmox.unplug(vm, 'scsi2')
  await withOneDisk(vm, site)
  const fails = `${vm.dir}/reads-fail.conf`
  await writeFile(fails, '[inject-error]\nevent = "none"\niotype = "read"\nerrno = "5"\nsector = "20480"\nonce = "on"\n')
  await site.vm.suspend({ owner: 'qm', reason: 'both at once', forMs: 60_000 })
  await proxmox.plug(vm, 'scsi1', fresh(vm), NEW_BYTES, (path) => writeFile(path, Buffer.alloc(NEW_BYTES, 7)), `blkdebug:${fails}:${fresh(vm)}`)
  await proxmox.plug(vm, 'scsi2', `${vm.dir}/other.raw`, NEW_BYTES, (path) => writeFile(path, Buffer.alloc(NEW_BYTES, 8)))
  const from = site.changes.length
  await site.vm.resume('qm')
  await site.next('streaming', from)
  while (site.vm.joining?.keys.join() !== 'scsi1') await pause()
  expect(site.vm.joining.failed).toMatch(/^scsi1: ./)
  expect((await cut(site, 'beside a disk that fails')).keys).toEqual(['scsi0', 'scsi2'])
  await site.untilJoined()
  expect(site.changes.slice(from).map(({ is }) => is)).toEqual(['attaching', 'syncing', 'streaming'])
  expect((await cut(site, 'whole')).keys).toEqual(['scsi0', 'scsi1', 'scsi2'])
  await restsEqual(vm, site)
  expect(await site.replicaEquals({ scsi2: `${vm.dir}/other.raw` })).toEqual({ scsi2: true })
}, 120_000)

test('on a slow line the copy leaves room for checkpoints: a checkpoint waits for a second or two of it, not for all that memory would hold', async () => {
  await using vm = await startBareVm({ ...busy, shape: '9.x' })
  await using site = await ProtectedSite.start({ proofEveryMs: 300, memoryBytesPerVm: 128 * MiB })
  await withOneDisk(vm, site)
  await proxmox.throttle(vm, 'scsi0', MiB / 2)
  site.vm.rate.bytesPerSec = 4 * MiB
  await proxmox.plug(vm, 'scsi1', fresh(vm), 2 * NEW_BYTES, (path) => writeFile(path, randomBytes(2 * NEW_BYTES)))
  await joins(site)
  const lagsMs: number[] = []
  for (let checkpoints = 0; site.vm.joining !== undefined; checkpoints++) {
    const startMs = performance.now()
    expect((await cut(site, `c${checkpoints}`)).keys).toContain('scsi0')
    lagsMs.push(Math.round(performance.now() - startMs))
  }
  process.stderr.write(`from cut to valid beside a first copy at 4 MiB/s: ${lagsMs.sort((one, other) => one - other).join(' ')} ms\n`)
  expect(lagsMs.length).toBeGreaterThan(4)
  expect(lagsMs.at(-1)).toBeLessThan(6_000)
  await site.untilJoined()
  await restsEqual(vm, site)
}, 120_000)
