import { writeFile } from 'node:fs/promises'
import { setTimeout as pause } from 'node:timers/promises'
import { describe, expect, test } from '@jest/globals'
import { attachCapture, discoverDisks, readCounters } from '../../plugin/qemu/index.ts'
import type { DiskCounters } from '../../plugin/qemu/index.ts'
import { sameContent } from './bare-load.ts'
import { startBareVm } from './bare-vm.ts'
import type { BareVm } from './bare-vm.ts'
import { copyPath, startFileTarget } from './block-snapshot.ts'
import { bootSector, bootWriteBytes } from './boot-sector.ts'

const writes = 500

const untilWrote = (vm: BareVm, key: string, wrBytes: number): Promise<DiskCounters> => vm.qmp(async (qmp) => {
  const endsAtMs = performance.now() + 60_000
  while (performance.now() < endsAtMs) {
    const counters = (await readCounters(qmp)).get(key)
    if (counters && counters.wrBytes >= wrBytes) return counters
    await pause(20)
  }
  throw new Error('the guest does not write')
})

describe.each([['8.4', 'scsi'], ['8.4', 'virtio'], ['9.x', 'scsi'], ['9.x', 'virtio']] as const)('shape %s, %s disk', (shape, bus) => {
  test('attached before its first instruction, the bytes a guest wrote are the bytes that reached the target', async () => {
    await using vm = await startBareVm({ shape, bus, bootSector: bootSector({ writes }), extraArgs: ['-S'] })
    const key = `${bus}0`
    const copy = copyPath(vm, 'target', key)
    await using target = await startFileTarget(vm, 'target')
    await writeFile(copy, bootSector({ writes }), { flag: 'r+' })
    const [attached] = await vm.qmp(async (qmp) => {
      const disks = await attachCapture(qmp, await discoverDisks(qmp), { nbdSocketPath: target.socketPath, exportNameOf: () => key })
      await qmp.execute('cont')
      return disks
    })
    expect(attached?.countersAtReady).toMatchObject({ wrBytes: 0, wrOperations: 0, unmapBytes: 0 })
    const counters = await untilWrote(vm, key, writes * bootWriteBytes)
    expect(counters).toMatchObject({ wrBytes: writes * bootWriteBytes, wrOperations: writes, failedWrOperations: 0, failedUnmapOperations: 0, onPath: true })
    await vm.kill()
    expect(await sameContent(vm.disks[0]?.path ?? '', copy)).toBe(true)
    expect(await target.stop()).toMatch(new RegExp(`write: ${writes} ops`))
  }, 90_000)
})
