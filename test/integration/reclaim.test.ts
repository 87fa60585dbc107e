import { mkdtemp, readdir, rm, stat } from 'node:fs/promises'
import { describe, expect, test } from '@jest/globals'
import { NbdClient } from '../../core/nbd/index.ts'
import { probeDiscards } from '../../plugin/qemu/index.ts'
import { reclaim } from '../../plugin/reclaim/index.ts'
import { serveFakeAgent } from '../../plugin/reclaim/testing.ts'
import { openWriteDoor } from './bare-load.ts'
import { startBareVm } from './bare-vm.ts'
import type { VmShape } from './bare-vm.ts'
import { ProtectedSite, VM_ID } from './protected-site.ts'

// A guest's discards under capture: what this QEMU does with them, and a bracket that gives them to the storage and to the recovery site. The guest agent is a fake whose
// trim is a discard through the guest's own root node.

const MiB = 1024 * 1024
const shapes: readonly VmShape[] = ['8.4', '9.x']

describe('the probe', () => {
  test('says what the discards of a real QEMU under a mirror job come to, and leaves nothing', async () => {
    const directory = await mkdtemp('/tmp/cdp-')
    try {
      const fate = await probeDiscards({ directory })
      expect(fate).toEqual({ reachesStorage: expect.any(Boolean), copied: expect.stringMatching(/^(discard|zeroes|not)$/), version: expect.stringMatching(/^\d+\.\d+\.\d+$/) })
      await expect(probeDiscards({ directory, program: '/nowhere/qemu-storage-daemon' })).rejects.toMatchObject({ code: 'NOT_FOUND' })
      await expect(probeDiscards({ directory, program: '/bin/false' })).rejects.toMatchObject({ code: 'IO' })
      expect(await readdir(directory)).toEqual([])
    } finally {
      await rm(directory, { recursive: true })
    }
  }, 60_000)
})

const allocatedBytes = async (file: string): Promise<number> => (await stat(file)).blocks * 512

describe.each(shapes)('a VM in the shape of %s', (shape) => {
  test('what it trims under capture is as the probe says; a bracket gives it back, and the recovery site reads the same', async () => {
    await using vm = await startBareVm({ shape, sizeBytes: 32 * MiB, discard: true })
    const door = await openWriteDoor(vm)
    await using site = await ProtectedSite.start({ existingNbdServers: { [VM_ID]: door } })
    const [{ path }] = vm.disks
    await using guest = await NbdClient.connect({ path: door }, { exportName: 'scsi0' })
    await guest.write(0, Buffer.alloc(16 * MiB, 7))
    await site.inStep(vm)
    expect(await allocatedBytes(path)).toBeGreaterThanOrEqual(16 * MiB)
    const { reachesStorage } = await probeDiscards({ directory: site.dir })
    await guest.trim(0, 4 * MiB)
    const afterTrim = await allocatedBytes(path)
    expect(afterTrim < 14 * MiB).toBe(reachesStorage)

    await using agent = await serveFakeAgent(`${site.dir}/qga`, async () => {
      await guest.trim(0, 12 * MiB)
      return { return: { paths: [{ path: '/', trimmed: 12 * MiB }] } }
    })
    const from = site.changes.length
    expect(await reclaim(site.vm, agent.path, 60_000)).toEqual({ trimmedBytes: 12 * MiB, failed: [] })
    expect(await allocatedBytes(path)).toBeLessThan(6 * MiB)
    await site.next('streaming', from)
    expect(site.changes.slice(from).map((state) => (state.is === 'syncing' ? state.kind : state.is))).toEqual(['suspended', 'attaching', 'bitmap', 'streaming'])
    expect(await site.replicaEquals({ scsi0: path })).toEqual({ scsi0: true })
  }, 120_000)
})
