import { existsSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, test } from '@jest/globals'
import { asList } from '../../core/qmp/index.ts'
import { startBareVm } from './bare-vm.ts'
import type { BareVm, VmShape } from './bare-vm.ts'
import { ProtectedSite, VM_ID } from './protected-site.ts'

// Protection of a VM through its life, with real QEMU processes and a real agent: what must come back by itself, and what must end.

const MiB = 1024 * 1024

const jobsOf = (vm: BareVm): Promise<number> => vm.qmp(async (qmp) => asList(await qmp.execute('query-block-jobs'), 'jobs').length)

const shapes: readonly VmShape[] = ['8.4', '9.x']
describe.each(shapes)('a protected VM in the shape of %s', (shape) => {
  test('comes into step; stopped, it waits without trying; started again, it comes into step again', async () => {
    await using site = await ProtectedSite.start()
    {
      await using vm = await startBareVm({ shape, sizeBytes: 8 * MiB })
      await site.runs(vm)
      site.vm.start()
      await site.until(() => site.state === 'streaming')
      expect(await jobsOf(vm)).toBe(1)
    }
    await site.until(() => site.state === 'detached')
    expect(site.vm.state.why).toBe('the VM does not run')
    // The time in which a retry planned before would come.
    const from = site.changes.length
    await new Promise((resolve) => setTimeout(resolve, 2500))
    expect(site.changes.slice(from)).toEqual([])
    await using vm = await startBareVm({ shape, sizeBytes: 8 * MiB })
    await site.runs(vm)
    await site.until(() => site.state === 'streaming')
    await site.vm.stop(false)
    expect(await jobsOf(vm)).toBe(0)
    expect(existsSync(join(site.dir, `state/vm-${VM_ID}.json`))).toBe(false)
  })

  test('stop in the middle of a long copy does not wait for it, and leaves no job behind', async () => {
    await using site = await ProtectedSite.start({ syncRateBytesPerSec: MiB })
    await using vm = await startBareVm({ shape, sizeBytes: 32 * MiB })
    await writeFile(vm.disks[0].path, Buffer.alloc(32 * MiB, 5))
    await site.runs(vm)
    site.vm.start()
    await site.until(() => site.state === 'syncing')
    await new Promise((resolve) => setTimeout(resolve, 500))
    const startMs = performance.now()
    await site.vm.stop(true)
    expect(performance.now() - startMs).toBeLessThan(4000)
    expect(await jobsOf(vm)).toBe(0)
    expect(site.vm.state).toMatchObject({ is: 'detached', why: 'protection was ended' })
  })
})
