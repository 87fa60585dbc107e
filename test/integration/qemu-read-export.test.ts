import { execFile } from 'node:child_process'
import { existsSync } from 'node:fs'
import { promisify } from 'node:util'
import { describe, expect, test } from '@jest/globals'
import { closeReadExport, detachCapture, discoverDisks, dropRotated, openReadExport, repairHalfStates, rotateBitmaps } from '../../plugin/qemu/index.ts'
import { mapOf, nbdUri, openWriteDoor, sameContent, startFio, writePattern } from './bare-load.ts'
import type { Extent } from './bare-load.ts'
import { startBareVm } from './bare-vm.ts'
import type { VmShape } from './bare-vm.ts'
import { attachAll, blockSnapshot, startFileTarget, untilWritten } from './block-snapshot.ts'

const run = promisify(execFile)
const mib = 1024 * 1024
const shapes: readonly VmShape[] = ['8.4', '9.x']

const dirtyRanges = (extents: readonly Extent[]): [number, number][] => extents.filter((extent) => extent.type === 1).map((extent) => [extent.offset, extent.length])

describe.each(shapes)('a VM in the command line shape of Proxmox VE %s', (shape) => {
  test('QEMU serves what the guest has written, read-only, beside the running job and under load', async () => {
    await using vm = await startBareVm({ shape, diskCount: 2 })
    const door = await openWriteDoor(vm)
    await using target = await startFileTarget(vm)
    await attachAll(vm, target.socketPath)
    const attached = await vm.qmp(blockSnapshot)
    await using load = startFio(nbdUri(door, 'scsi0'), { sizeBytes: 64 * mib, seed: 3 })
    await untilWritten(vm, mib)
    const [first, second] = await vm.qmp(async (qmp) => openReadExport(qmp, await discoverDisks(qmp), { socketPath: `${vm.dir}/read`, existingServerPath: door }))
    expect(first).toEqual({ key: 'scsi0', socketPath: door, exportName: 'cdp-read-scsi0', sizeBytes: 64 * mib, bitmapContext: undefined, dirtyBytes: 0 })
    expect(second?.exportName).toBe('cdp-read-scsi1')
    const uri = nbdUri(door, 'cdp-read-scsi0')
    const { stdout } = await run('nbdinfo', ['--json', uri])
    expect(JSON.parse(stdout)).toMatchObject({ exports: [{ 'is_read_only': true, 'export-size': 64 * mib }] })
    await run('nbdcopy', [uri, 'null:'])
    await load.stop()
    expect(await sameContent(uri, vm.disks[0]?.path ?? '')).toBe(true)
    expect(await sameContent(uri, nbdUri(target.socketPath, 'scsi0'))).toBe(true)
    await vm.qmp((qmp) => closeReadExport(qmp, { socketPath: `${vm.dir}/read` }))
    expect(await vm.qmp(blockSnapshot)).toBe(attached)
  })

  test('a read export stays open while capture is lost and attached again', async () => {
    await using vm = await startBareVm({ shape })
    const door = await openWriteDoor(vm)
    await using first = await startFileTarget(vm, 'first')
    await attachAll(vm, first.socketPath)
    await vm.qmp(async (qmp) => openReadExport(qmp, await discoverDisks(qmp), { socketPath: `${vm.dir}/read`, existingServerPath: door }))
    await first.kill()
    await vm.qmp((qmp) => detachCapture(qmp, { keepBitmaps: true, keepExports: true }))
    await using second = await startFileTarget(vm, 'second')
    await attachAll(vm, second.socketPath)
    await writePattern(nbdUri(door, 'scsi0'), 9, mib, 65536)
    expect(await sameContent(nbdUri(door, 'cdp-read-scsi0'), vm.disks[0]?.path ?? '')).toBe(true)
    expect(await sameContent(nbdUri(second.socketPath, 'scsi0'), vm.disks[0]?.path ?? '')).toBe(true)
  })

  test('a server of our own is started, stopped, found again after a crash, and taken away by a repair', async () => {
    await using vm = await startBareVm({ shape })
    const before = await vm.qmp(blockSnapshot)
    const socketPath = `${vm.dir}/read`
    const open = () => vm.qmp(async (qmp) => openReadExport(qmp, await discoverDisks(qmp), { socketPath }))
    await open()
    expect(await sameContent(nbdUri(socketPath, 'cdp-read-scsi0'), vm.disks[0]?.path ?? '')).toBe(true)
    await expect(open()).rejects.toMatchObject({ code: 'CONFLICT' })
    await vm.qmp((qmp) => closeReadExport(qmp, { socketPath }))
    await vm.qmp((qmp) => closeReadExport(qmp, { socketPath }))
    expect(existsSync(socketPath)).toBe(false)
    await vm.qmp((qmp) => qmp.execute('nbd-server-start', { addr: { type: 'unix', data: { path: socketPath } } }))
    await open()
    expect(await vm.qmp((qmp) => repairHalfStates(qmp, { keepBitmaps: false, readSocketPath: socketPath }))).toMatchObject({ exports: ['cdp-read-scsi0'], serverStopped: true })
    expect(await vm.qmp(blockSnapshot)).toBe(before)
    await open()
  })

  test("an NBD server of somebody else is neither used unasked nor stopped", async () => {
    await using vm = await startBareVm({ shape })
    const theirs = `${vm.dir}/theirs`
    await vm.qmp((qmp) => qmp.execute('nbd-server-start', { addr: { type: 'unix', data: { path: theirs } } }))
    await expect(vm.qmp(async (qmp) => openReadExport(qmp, await discoverDisks(qmp), { socketPath: `${vm.dir}/read` }))).rejects.toMatchObject({ code: 'CONFLICT', retry: true })
    await vm.qmp(async (qmp) => openReadExport(qmp, await discoverDisks(qmp), { socketPath: `${vm.dir}/read`, existingServerPath: theirs }))
    await vm.qmp((qmp) => repairHalfStates(qmp, { keepBitmaps: false, readSocketPath: `${vm.dir}/read` }))
    await vm.qmp(async (qmp) => openReadExport(qmp, await discoverDisks(qmp), { socketPath: `${vm.dir}/read`, existingServerPath: theirs }))
    expect((await mapOf(nbdUri(theirs, 'cdp-read-scsi0'), 'base:allocation')).length).toBeGreaterThan(0)
  })

  test('rotated bitmaps say what was written, are merged, survive detach, and are dropped', async () => {
    await using vm = await startBareVm({ shape, diskCount: 2 })
    const door = await openWriteDoor(vm)
    const before = await vm.qmp(blockSnapshot)
    await using target = await startFileTarget(vm)
    await attachAll(vm, target.socketPath)
    const rotate = () => vm.qmp(async (qmp) => rotateBitmaps(qmp, await discoverDisks(qmp)))
    const openWithBitmap = () => vm.qmp(async (qmp) => openReadExport(qmp, await discoverDisks(qmp), { socketPath: `${vm.dir}/read`, existingServerPath: door, bitmap: 'rotated' }))
    const close = () => vm.qmp((qmp) => closeReadExport(qmp, { socketPath: `${vm.dir}/read` }))
    const drop = () => vm.qmp(async (qmp) => dropRotated(qmp, await discoverDisks(qmp)))
    const dirty = async (number: number) => {
      const [...opened] = await openWithBitmap()
      const entry = opened[number]
      return dirtyRanges(await mapOf(nbdUri(door, entry?.exportName ?? ''), entry?.bitmapContext ?? ''))
    }

    await writePattern(nbdUri(door, 'scsi0'), 1, 1 * mib, 65536)
    expect(await rotate()).toEqual([{ key: 'scsi0', current: 'cdp-bitmap-2', rotated: 'cdp-bitmap-1' }, { key: 'scsi1', current: 'cdp-bitmap-2', rotated: 'cdp-bitmap-1' }])
    await writePattern(nbdUri(door, 'scsi0'), 2, 2 * mib, 65536)
    expect(await dirty(0)).toEqual([[1 * mib, 65536]])
    await expect(rotate()).rejects.toMatchObject({ code: 'CONFLICT', retry: true })
    await close()

    await vm.qmp((qmp) => detachCapture(qmp, { keepBitmaps: true }))
    await writePattern(nbdUri(door, 'scsi0'), 3, 3 * mib, 4096)
    await writePattern(nbdUri(door, 'scsi1'), 3, 5 * mib, 4096)
    expect((await rotate())[0]).toEqual({ key: 'scsi0', current: 'cdp-bitmap-3', rotated: 'cdp-bitmap-1' })
    expect(await dirty(0)).toEqual([[1 * mib, 65536], [2 * mib, 65536], [3 * mib, 65536]])
    await close()
    expect(await dirty(1)).toEqual([[5 * mib, 65536]])
    await close()

    const [attached] = await attachAll(vm, target.socketPath)
    expect(attached?.bitmap).toMatchObject({ name: 'cdp-bitmap-3', existed: true })
    expect(await drop()).toHaveLength(2)
    expect(await drop()).toEqual([])
    expect((await openWithBitmap()).map((entry) => entry.bitmapContext)).toEqual([undefined, undefined])
    await vm.qmp((qmp) => detachCapture(qmp, { keepBitmaps: false }))
    expect(await vm.qmp(blockSnapshot)).toBe(before)
  })
})
