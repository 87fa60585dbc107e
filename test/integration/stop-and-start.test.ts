import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { open, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import { promisify } from 'node:util'
import { describe, expect, test } from '@jest/globals'
import { namesOf, readCounters } from '../../plugin/qemu/index.ts'
import type { StopNote } from '../../plugin/protect/clean-stop.ts'
import { startBareVm } from './bare-vm.ts'
import type { BareVm, BareVmOptions, VmShape } from './bare-vm.ts'
import { bootSector, bootWriteBytes } from './boot-sector.ts'
import { ProtectedSite, VM_ID } from './protected-site.ts'

// What the stop and the next start of a protected VM cost, with real QEMU processes, a guest that writes as soon as it runs, and a real agent.

const MiB = 1024 * 1024
const WRITES = 64
const FROZEN = ['-S']

const shapes: readonly VmShape[] = ['8.4', '9.x']
const startVm = (shape: VmShape, more: Partial<BareVmOptions> = {}): Promise<BareVm> =>
  startBareVm({ shape, sizeBytes: 8 * MiB, diskCount: 2, ...more, ...(more.disks === undefined ? { bootSector: bootSector({ writes: WRITES }) } : {}) })
const pathsOf = (vm: BareVm): Record<string, string> => Object.fromEntries(vm.disks.map(({ key, path }) => [key, path]))
const writtenBytes = (vm: BareVm): Promise<number> => vm.qmp(async (qmp) => (await readCounters(qmp)).get(vm.disks[0].key)?.wrBytes ?? 0)

/** Lets it run, if it was frozen; resolves when its guest has written all that it will. */
const guestWrites = async (vm: BareVm, bytes = WRITES * bootWriteBytes): Promise<void> => {
  await vm.qmp((qmp) => qmp.execute('cont'))
  while ((await writtenBytes(vm)) < bytes) await pause(50)
}

const noteOf = async (site: ProtectedSite): Promise<StopNote> => {
  const path = join(site.dir, `state/stopped-${VM_ID}.json`)
  while (!existsSync(path)) await pause(20)
  return JSON.parse(await readFile(path, 'utf8')) as StopNote
}

/** What the state was in turn until the VM was in step, and why in the last but one. */
const comesIntoStep = async (site: ProtectedSite, vm: BareVm): Promise<{ way: string[]; why: string }> => {
  const from = site.changes.length
  await site.runs(vm)
  await site.next('streaming', from)
  const states = site.changes.slice(from)
  const { why } = states.find(({ is }) => is === 'syncing') ?? states[states.length - 1]
  return { way: states.map(({ is }) => is), why }
}
const bySync = ['attaching', 'syncing', 'streaming']

const stops = async (site: ProtectedSite, vm: BareVm, how: 'quit' | 'kill'): Promise<StopNote> => {
  await vm[how]()
  await site.until(() => site.state === 'detached')
  return await noteOf(site)
}

describe.each(shapes)('a VM in the shape of %s', (shape) => {
  test('stopped cleanly and started, it is in step without a sync; touched, killed or with a state of its own, it syncs and says why', async () => {
    await using site = await ProtectedSite.start()
    await using first = await startVm(shape)
    await site.inStep(first)
    await guestWrites(first)
    expect(await site.cut('before')).toBe(true)
    const { epoch } = site.store
    expect(await stops(site, first, 'quit')).toHaveProperty('clean')

    await using second = await startVm(shape, { disks: first.disks, extraArgs: FROZEN })
    const startMs = performance.now()
    const { way, why } = await comesIntoStep(site, second)
    console.log(`${shape}: in step ${(performance.now() - startMs).toFixed(0)} ms after the VM was there`)
    expect([way, why]).toEqual([['attaching', 'streaming'], 'the VM was stopped and started; nothing was missed, no sync was needed'])
    expect(site.store.epoch).toBe(epoch + 1)
    expect(await site.cut('after')).toBe(true)
    await guestWrites(second)
    expect(await site.replicaEquals(pathsOf(first))).toEqual({ scsi0: true, scsi1: true })
    expect(await site.cut('after its writes')).toBe(true)

    expect(await stops(site, second, 'kill')).toEqual({ format: 1, whyNot: expect.stringMatching(/not in step when the VM stopped \(QEMU ended the connection/) })
    await using third = await startVm(shape, { disks: first.disks, extraArgs: FROZEN })
    expect(await comesIntoStep(site, third)).toEqual({ way: bySync, why: expect.stringMatching(/^the VM was started; capture was not in step when the VM stopped/) })
    expect(await stops(site, third, 'quit')).toHaveProperty('clean')

    {
      // Another disk than the one that is booted, and with the size and the time of modification that it had.
      await using file = await open(first.disks[1].path, 'r+')
      const { atime, mtime } = await file.stat()
      await file.write(Buffer.alloc(4096, 7), 0, 4096, 4 * MiB)
      await file.utimes(atime, mtime)
    }
    await using fourth = await startVm(shape, { disks: first.disks, extraArgs: FROZEN })
    expect(await comesIntoStep(site, fourth)).toEqual({ way: bySync, why: expect.stringMatching(/disk changed while the VM was off \(scsi1: its file was changed\)/) })
    expect(await site.replicaEquals(pathsOf(first))).toEqual({ scsi0: true, scsi1: true })

    // It saves its state and ends, as for a hibernation. What comes from it writes nothing: only the command line tells.
    await guestWrites(fourth)
    const saved = join(first.dir, 'state')
    await fourth.qmp(async (qmp) => {
      await qmp.execute('migrate', { uri: `file:${saved}` })
      while (((await qmp.execute('query-migrate')) as { status: string }).status !== 'completed') await pause(50)
    })
    expect(await stops(site, fourth, 'quit')).toHaveProperty('clean')
    await using fifth = await startVm(shape, { disks: first.disks, extraArgs: ['-incoming', `file:${saved}`] })
    expect(await comesIntoStep(site, fifth)).toEqual({ way: bySync, why: expect.stringMatching(/target of a migration or from a saved state/) })
  }, 180_000)

  test('started without waiting for us, a guest that writes at once is never taken for one that did not', async () => {
    await using site = await ProtectedSite.start()
    await using first = await startVm(shape, { diskCount: 1 })
    await site.inStep(first)
    await guestWrites(first)
    expect(await stops(site, first, 'quit')).toHaveProperty('clean')
    // Attached when the guest has written all, something, or nothing yet.
    const ways: string[] = []
    for (const bytes of [WRITES * bootWriteBytes, bootWriteBytes, 0, 0]) {
      await using vm = await startVm(shape, { disks: first.disks })
      while ((await writtenBytes(vm)) < bytes) await pause(1)
      const { way, why } = await comesIntoStep(site, vm)
      ways.push(way.includes('syncing') ? 'sync' : 'none')
      if (bytes > 0) expect(why).toMatch(/scsi0: the guest wrote before capture was attached/)
      await guestWrites(vm)
      expect(await site.replicaEquals(pathsOf(first))).toEqual({ scsi0: true })
      expect(await stops(site, vm, 'quit')).toHaveProperty('clean')
    }
    expect(ways.slice(0, 2)).toEqual(['sync', 'sync'])
    console.log(`${shape}: attached after all, after one, before any write, before any: ${ways.join(', ')}`)
  }, 180_000)
})

test('what a plugin has not seen is no clean stop; what it has seen is one for the plugin after it', async () => {
  await using site = await ProtectedSite.start()
  await using first = await startVm('9.x', { diskCount: 1 })
  await site.runs(first)
  {
    await using keeper = site.keeper()
    await keeper.until('streaming')
  }
  await first.quit()
  await using second = await startVm('9.x', { disks: first.disks, extraArgs: FROZEN })
  await site.runs(second)
  {
    await using keeper = site.keeper()
    await keeper.until('streaming')
    expect(keeper.states.find(({ is }) => is === 'syncing')?.why).toMatch(/^the VM runs; its last stop was not seen/)
    await second.quit()
    expect(await noteOf(site)).toHaveProperty('clean')
  }
  await using third = await startVm('9.x', { disks: first.disks, extraArgs: FROZEN })
  await site.runs(third)
  await using keeper = site.keeper()
  await keeper.until('streaming')
  expect(keeper.states.map(({ is }) => is)).toEqual(['attaching', 'streaming'])
}, 180_000)

test('an image with snapshots: used, it starts without a sync; rolled back while the VM was off, it syncs', async () => {
  const snapshot = (path: string, ...what: string[]): Promise<unknown> => promisify(execFile)('qemu-img', ['snapshot', ...what, 's', path])
  await using site = await ProtectedSite.start()
  await using first = await startVm('9.x', { diskCount: 1, format: 'qcow2' })
  const again = (): Promise<BareVm> => startVm('9.x', { format: 'qcow2', disks: first.disks, extraArgs: FROZEN })
  await site.inStep(first)
  await guestWrites(first)
  await stops(site, first, 'quit')
  await snapshot(first.disks[0].path, '-c')
  await using second = await again()
  expect(await comesIntoStep(site, second)).toEqual({ way: bySync, why: expect.stringMatching(/disk changed while the VM was off/) })
  await guestWrites(second)
  expect(await stops(site, second, 'quit')).toHaveProperty('clean')
  await using third = await again()
  expect((await comesIntoStep(site, third)).way).toEqual(['attaching', 'streaming'])
  expect(await stops(site, third, 'quit')).toHaveProperty('clean')
  await snapshot(first.disks[0].path, '-a')
  await using fourth = await again()
  expect(await comesIntoStep(site, fourth)).toEqual({ way: bySync, why: expect.stringMatching(/disk changed while the VM was off \(scsi0: its file was changed\)/) })
  expect(await site.replicaEquals(pathsOf(first), 'qcow2')).toEqual({ scsi0: true })
}, 180_000)

test('a goodbye that was not the end of QEMU is no clean stop: what the guest wrote after it is found', async () => {
  await using site = await ProtectedSite.start()
  await using first = await startVm('9.x', { diskCount: 1, extraArgs: FROZEN })
  await site.inStep(first)
  // Somebody takes our job out, and nobody else gets at QEMU until it has ended.
  await first.qmp(async (qmp) => {
    await qmp.execute('block-job-cancel', { device: namesOf('scsi0').job })
    await qmp.waitForEvent(({ event }) => event === 'BLOCK_JOB_COMPLETED', { deadlineMs: 10_000 })
    await qmp.execute('blockdev-del', { 'node-name': namesOf('scsi0').target })
    await qmp.execute('cont')
    while (((await readCounters(qmp)).get('scsi0')?.wrBytes ?? 0) < WRITES * bootWriteBytes) await pause(50)
    await qmp.execute('quit')
  })
  await site.until(() => site.state === 'detached')
  expect(await noteOf(site)).toEqual({ format: 1, whyNot: 'scsi0: it was written to after the last write that was captured' })
  await using second = await startVm('9.x', { disks: first.disks, extraArgs: FROZEN })
  expect((await comesIntoStep(site, second)).way).toEqual(bySync)
  expect(await site.replicaEquals(pathsOf(first))).toEqual({ scsi0: true })
}, 180_000)
