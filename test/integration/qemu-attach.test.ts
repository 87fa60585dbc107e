import { describe, expect, test } from '@jest/globals'
import { withQmp } from '../../core/qmp/index.ts'
import { attachCapture, detachCapture, discoverDisks, readCounters, repairHalfStates } from '../../plugin/qemu/index.ts'
import { nbdUri, openWriteDoor, sameContent, startFio, writePattern } from './bare-load.ts'
import { attachAll, blockSnapshot, startFileTarget, untilWritten } from './block-snapshot.ts'
import { startBareVm } from './bare-vm.ts'
import { bootSector } from './boot-sector.ts'
import type { BareVm, VmShape } from './bare-vm.ts'
import { startNbdkit } from './nbdkit-target.ts'

const mib = 1024 * 1024
const shapes: readonly VmShape[] = ['8.4', '9.x']
/** The guest itself writes: unlike a client of an NBD export it is put back onto its own node. */
const busy = { sizeBytes: 72 * mib, bootSector: bootSector({}) }
const nothing = { shields: [], jobs: [], targets: [], exports: [], bitmaps: [], serverStopped: false }

/** Resolves when the job of every disk stands still because of its target. */
const jobsFailed = async (vm: BareVm): Promise<void> => {
  for (;;) {
    const counters = await vm.qmp(readCounters)
    if (vm.disks.every(({ key }) => counters.get(key)?.job?.failed === true)) return
    await new Promise((resolve) => setTimeout(resolve, 20))
  }
}

describe.each(shapes)('a VM in the command line shape of Proxmox VE %s', (shape) => {
  test.each(['scsi', 'virtio'] as const)('its %s disks are found, the same whether attached or not', async (bus) => {
    await using vm = await startBareVm({ shape, bus, diskCount: 2 })
    await using target = await startFileTarget(vm)
    const before = await vm.qmp(discoverDisks)
    expect(before.map(({ key, shape: found, sizeBytes, iothread }) => ({ key, found, sizeBytes, iothread }))).toEqual(
      vm.disks.map(({ key }, number) => ({ key, found: shape, sizeBytes: 64 * mib, iothread: bus === 'scsi' ? `iothread-virtioscsi${number}` : `iothread-${key}` })))
    await attachAll(vm, target.socketPath)
    expect(await vm.qmp(discoverDisks)).toEqual(before)
  })

  test.each([['scsi', 1], ['scsi', 2], ['virtio', 2]] as const)('%s, %i disks: writes reach the target, and detach leaves nothing behind', async (bus, diskCount) => {
    await using vm = await startBareVm({ shape, bus, diskCount })
    const door = await openWriteDoor(vm)
    const before = await vm.qmp(blockSnapshot)
    await using target = await startFileTarget(vm)
    const attached = await attachAll(vm, target.socketPath)
    expect(attached.map(({ key }) => key)).toEqual(vm.disks.map(({ key }) => key))
    for (const { key, path } of vm.disks) {
      await writePattern(nbdUri(door, key), 0x5a, 3 * mib, mib)
      await startFio(nbdUri(door, key), { sizeBytes: 64 * mib, writes: 2000, seed: 7 }).ended
      expect(await sameContent(nbdUri(target.socketPath, key), path)).toBe(true)
    }
    const counters = await vm.qmp(readCounters)
    for (const { key } of vm.disks) expect(counters.get(key)).toMatchObject({ onPath: true, job: { ready: true, status: 'ready' } })
    await vm.qmp((qmp) => detachCapture(qmp, { keepBitmaps: false }))
    expect(await vm.qmp(blockSnapshot)).toBe(before)
    expect(await vm.qmp((qmp) => detachCapture(qmp, { keepBitmaps: false }))).toEqual(nothing)
  })

  test('a target that dies stops the job and nothing else; capture can be attached again', async () => {
    await using vm = await startBareVm({ shape, ...busy })
    const before = await vm.qmp(blockSnapshot)
    const first = await startFileTarget(vm, 'first')
    await attachAll(vm, first.socketPath)
    await untilWritten(vm, mib)
    await first.kill()
    await jobsFailed(vm)
    expect((await vm.qmp(readCounters)).get('scsi0')).toMatchObject({ onPath: false, job: { failed: true, paused: true } })
    const repaired = await vm.qmp((qmp) => repairHalfStates(qmp, { keepBitmaps: true }))
    expect(repaired).toEqual({ ...nothing, shields: shape === '8.4' ? ['cdp-shield-scsi0'] : [], jobs: ['cdp-job-scsi0'], targets: ['cdp-target-scsi0'] })
    await using second = await startFileTarget(vm, 'second')
    await attachAll(vm, second.socketPath)
    const counted = (await vm.qmp(readCounters)).get('scsi0')
    while ((await vm.qmp(readCounters)).get('scsi0')?.wrBytes === counted?.wrBytes) await new Promise((resolve) => setTimeout(resolve, 20))
    await vm.qmp((qmp) => detachCapture(qmp, { keepBitmaps: false }))
    expect(await vm.qmp(blockSnapshot)).toBe(before)
  })

  test.each(['before', 'during'] as const)('an attach whose connection ends %s any of its steps is repaired from the state of QEMU alone', async (moment) => {
    await using vm = await startBareVm({ shape, diskCount: 2 })
    await using target = await startFileTarget(vm)
    const before = await vm.qmp(blockSnapshot)
    const stepCount = shape === '8.4' ? 17 : 7
    for (let stopAt = 0; stopAt < stepCount; stopAt++) {
      const seen: string[] = []
      await withQmp(vm.qmpPath, { lingerMs: 0 }, async (qmp) => {
        const disks = await discoverDisks(qmp)
        const attach = attachCapture(qmp, disks, {
          nbdSocketPath: target.socketPath, exportNameOf: (key) => key,
          onStep: (step, index) => {
            seen.push(step.is)
            if (index !== stopAt) return
            if (moment === 'before') void qmp.close()
            else queueMicrotask(() => setImmediate(() => void qmp.close()))
          },
        })
        await expect(attach).rejects.toMatchObject({ code: 'CAPTURE_ATTACH', context: { undone: false } })
      })
      expect(seen.length).toBeGreaterThan(stopAt)
      await vm.qmp((qmp) => repairHalfStates(qmp, { keepBitmaps: false }))
      expect(await vm.qmp(blockSnapshot)).toBe(before)
    }
    await attachAll(vm, target.socketPath)
    expect((await vm.qmp(readCounters)).get('scsi1')).toMatchObject({ onPath: true })
  })

  test('an attach that fails at any step undoes the steps before it', async () => {
    await using vm = await startBareVm({ shape, diskCount: 2 })
    await using target = await startFileTarget(vm)
    const before = await vm.qmp(blockSnapshot)
    for (let failAt = 0; failAt < (shape === '8.4' ? 17 : 7); failAt++) {
      const attach = vm.qmp(async (qmp) => attachCapture(qmp, await discoverDisks(qmp), {
        nbdSocketPath: target.socketPath, exportNameOf: (key) => key,
        onStep: (_, index) => {
          if (index === failAt) throw new Error('the operator pulled the plug')
        },
      }))
      await expect(attach).rejects.toMatchObject({ code: 'CAPTURE_ATTACH', context: { undone: true } })
      expect(await vm.qmp(blockSnapshot)).toBe(before)
    }
  })

  test('a target of another size is an error with its reason, and nothing is left', async () => {
    await using vm = await startBareVm({ shape })
    await using target = await startNbdkit(vm.dir, 'small', ['memory', '32M'])
    const before = await vm.qmp(blockSnapshot)
    await expect(attachAll(vm, target.socketPath)).rejects.toThrow(/different sizes/)
    expect(await vm.qmp(blockSnapshot)).toBe(before)
  })

  test('attaching twice is refused and leaves the first attach alone', async () => {
    await using vm = await startBareVm({ shape })
    await using target = await startFileTarget(vm)
    await attachAll(vm, target.socketPath)
    const before = await vm.qmp(blockSnapshot)
    await expect(attachAll(vm, target.socketPath)).rejects.toMatchObject({ code: 'CONFLICT' })
    expect(await vm.qmp(blockSnapshot)).toBe(before)
  })

  test(shape === '8.4' ? 'while a backup runs, attach and detach are refused and change nothing' : 'attach and detach work while a backup runs below', async () => {
    await using vm = await startBareVm({ shape })
    await using target = await startFileTarget(vm)
    const [before, disks] = [await vm.qmp(blockSnapshot), await vm.qmp(discoverDisks)]
    const startBackup = () => vm.qmp(async (qmp) => {
      const root = ((await qmp.execute('query-block')) as { inserted?: { 'node-name': string } }[]).find((device) => device.inserted)?.inserted?.['node-name']
      const disk = (await discoverDisks(qmp))[0]
      await qmp.execute('blockdev-add', { driver: 'null-co', 'node-name': 'archive', size: 64 * mib })
      // What vzdump's backup addresses: the guest's root node on 8.4, the node below the throttle on 9.x.
      await qmp.execute('blockdev-backup', {
        'job-id': 'drive-scsi0', device: shape === '8.4' ? root : disk?.formatNode, target: 'archive', sync: 'full', speed: 65536, 'filter-node-name': 'backup-filter' })
    })
    const endBackup = () => vm.qmp(async (qmp) => {
      await qmp.execute('block-job-cancel', { device: 'drive-scsi0', force: true })
      await qmp.waitForEvent((event) => event.event === 'JOB_STATUS_CHANGE' && event.data['id'] === 'drive-scsi0' && event.data['status'] === 'null', { deadlineMs: 5000 })
      await qmp.execute('blockdev-del', { 'node-name': 'archive' })
    })
    await startBackup()
    if (shape === '8.4') {
      await expect(attachAll(vm, target.socketPath)).rejects.toMatchObject({ code: 'CONFLICT', retry: true })
      await endBackup()
      await attachAll(vm, target.socketPath)
      await startBackup()
      const during = await vm.qmp(blockSnapshot)
      expect(await vm.qmp(discoverDisks)).toEqual(disks)
      await expect(vm.qmp((qmp) => detachCapture(qmp, { keepBitmaps: false }))).rejects.toMatchObject({ code: 'CONFLICT', retry: true })
      expect(await vm.qmp(blockSnapshot)).toBe(during)
    } else {
      const during = await vm.qmp(blockSnapshot)
      for (let cycle = 0; cycle < 3; cycle++) {
        await attachAll(vm, target.socketPath)
        expect((await vm.qmp(readCounters)).get('scsi0')).toMatchObject({ onPath: true })
        expect(await vm.qmp(discoverDisks)).toEqual(disks)
        await vm.qmp((qmp) => detachCapture(qmp, { keepBitmaps: false }))
        expect(await vm.qmp(blockSnapshot)).toBe(during)
      }
    }
    await endBackup()
    await vm.qmp((qmp) => detachCapture(qmp, { keepBitmaps: false }))
    expect(await vm.qmp(blockSnapshot)).toBe(before)
  })

  test('a target that hangs and is then killed under load leaves a VM that is repaired and attached again', async () => {
    await using vm = await startBareVm({ shape, ...busy })
    const before = await vm.qmp(blockSnapshot)
    await using first = await startFileTarget(vm, 'first')
    await attachAll(vm, first.socketPath)
    await untilWritten(vm, mib)
    process.kill(first.pid, 'SIGSTOP')
    const hung = vm.qmp((qmp) => repairHalfStates(qmp, { keepBitmaps: true }))
    await first.kill()
    await hung
    await using second = await startFileTarget(vm, 'second')
    await attachAll(vm, second.socketPath)
    await vm.qmp((qmp) => detachCapture(qmp, { keepBitmaps: false }))
    expect(await vm.qmp(blockSnapshot)).toBe(before)
  })

  test('one of two disks can be detached alone', async () => {
    await using vm = await startBareVm({ shape, diskCount: 2 })
    await using target = await startFileTarget(vm)
    await attachAll(vm, target.socketPath)
    await vm.qmp((qmp) => detachCapture(qmp, { keys: ['scsi0'], keepBitmaps: false }))
    const counters = await vm.qmp(readCounters)
    expect([counters.get('scsi0')?.onPath, counters.get('scsi1')?.onPath]).toEqual([false, true])
    const left = await vm.qmp(blockSnapshot)
    expect(left).not.toContain('cdp-target-scsi0')
    expect(left.match(/cdp-bitmap-/g)).toHaveLength(1)
  })
})

test('8.4: after a disk move the job is an orphan, which the counters tell, and the repair leaves only the new disk', async () => {
  await using vm = await startBareVm({ shape: '8.4' })
  await using target = await startFileTarget(vm)
  await attachAll(vm, target.socketPath)
  await vm.qmp(async (qmp) => {
    const waitForJob = (name: string, status?: string) => qmp.waitForEvent((event) =>
      event.event === name && (event.data['device'] ?? event.data['id']) === 'drive-scsi0' && (status === undefined || event.data['status'] === status), { deadlineMs: 10_000 })
    await qmp.execute('drive-mirror', { device: 'drive-scsi0', 'job-id': 'drive-scsi0', target: `${vm.dir}/moved.raw`, format: 'raw', sync: 'full', mode: 'absolute-paths' })
    await waitForJob('BLOCK_JOB_READY')
    await qmp.execute('block-job-complete', { device: 'drive-scsi0' })
    await waitForJob('JOB_STATUS_CHANGE', 'null')
  })
  expect((await vm.qmp(readCounters)).get('scsi0')).toMatchObject({ onPath: false, job: { ready: true } })
  expect(await vm.qmp((qmp) => repairHalfStates(qmp, { keepBitmaps: false }))).toMatchObject({ shields: ['cdp-shield-scsi0'], jobs: ['cdp-job-scsi0'] })
  const left = await vm.qmp(blockSnapshot)
  expect(left).not.toContain('cdp-')
  expect((JSON.parse(left) as { nodes: string[] }).nodes).toHaveLength(2)
  await attachAll(vm, target.socketPath)
  expect((await vm.qmp(readCounters)).get('scsi0')).toMatchObject({ onPath: true })
})

test('a QMP socket whose queue is full is waited for, and its holder is not disturbed', async () => {
  await using vm = await startBareVm({ shape: '9.x' })
  const release = Promise.withResolvers<void>()
  const inside = Promise.withResolvers<void>()
  const holder = vm.qmp(async (qmp) => {
    inside.resolve()
    await release.promise
    return qmp.execute('query-status')
  })
  await inside.promise
  const waiting = Array.from({ length: 8 }, () => vm.qmp((qmp) => qmp.execute('query-status')))
  await expect(withQmp(vm.qmpPath, { deadlineMs: 200 }, () => Promise.resolve())).rejects.toMatchObject({ retry: true })
  release.resolve()
  for (const answer of await Promise.all([holder, ...waiting])) expect(answer).toMatchObject({ status: 'running' })
})

test('a QEMU below 9.0 is refused before anything is asked of it', async () => {
  const asked: string[] = []
  const old = { version: { major: 7, minor: 2, micro: 22, package: '' }, execute: (command: string) => (asked.push(command), Promise.resolve([])) }
  await expect(discoverDisks(old)).rejects.toMatchObject({ code: 'QEMU_TOO_OLD', message: expect.stringContaining('7.2.22') as unknown })
  expect(asked).toEqual([])
})
