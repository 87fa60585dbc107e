import { setTimeout as delay } from 'node:timers/promises'
import { describe, expect, test } from '@jest/globals'
import { startBareVm } from './bare-vm.ts'
import type { BareVm, VmShape } from './bare-vm.ts'
import { bootSector } from './boot-sector.ts'
import { ProtectedSite, fenceOf, oursIn } from './protected-site.ts'

// A group that the recovery site has taken over, with real QEMU processes and a real agent: the guest goes on, capture does not.

const MiB = 1024 * 1024
const shapes: readonly VmShape[] = ['8.4', '9.x']
const startBusyVm = (shape: VmShape): Promise<BareVm> => startBareVm({ shape, sizeBytes: 72 * MiB, bootSector: bootSector({}) })

/** Writes of the guest so far, those that failed, and whether it runs. */
const guestOf = (vm: BareVm): Promise<{ writes: number; failed: number; running: boolean }> => vm.qmp(async (qmp) => {
  const { running } = (await qmp.execute('query-status')) as { running: boolean }
  const devices = (await qmp.execute('query-blockstats')) as { stats: { wr_operations: number; failed_wr_operations: number } }[]
  return { running, writes: devices.reduce((sum, { stats }) => sum + stats.wr_operations, 0), failed: devices.reduce((sum, { stats }) => sum + stats.failed_wr_operations, 0) }
})
/** The guest writes on: resolves when it has written more than before, with how long that took. */
const writesOn = async (vm: BareVm): Promise<number> => {
  const before = await guestOf(vm)
  const startedMs = performance.now()
  for (;;) {
    const now = await guestOf(vm)
    expect(now).toMatchObject({ failed: 0, running: true })
    if (now.writes > before.writes) return performance.now() - startedMs
    await delay(20)
  }
}
const untilNothingOfOurs = async (vm: BareVm): Promise<void> => {
  for (let ours = await oursIn(vm); ours.parts.length + ours.bitmaps.length > 0; ours = await oursIn(vm)) await delay(50)
}

describe.each(shapes)('a busy guest in the shape of %s', (shape) => {
  test('whose group is taken over writes on, nothing of ours stays in its QEMU, and no other life of plugin or VM attaches again', async () => {
    await using vm = await startBusyVm(shape)
    await using site = await ProtectedSite.start()
    await site.inStep(vm)
    await site.untilCaptured()
    expect(await site.cut('before')).toBe(true)
    const { epoch } = site.store
    const raised = performance.now()
    await site.ingest.raiseGeneration('site-a', 'shop', 'failed over by ann')
    await site.until(() => site.state === 'fenced')
    expect(site.vm.state.why).toMatch(/^the recovery site has taken shop over \(generation 2, here 1\): failed over by ann\. Decide on which site/)
    await untilNothingOfOurs(vm)
    const goneMs = performance.now() - raised
    const gapMs = await writesOn(vm)
    console.log(`${shape}: fenced, and all of it out of QEMU, ${goneMs.toFixed(0)} ms after the handover; the guest's next write came within ${gapMs.toFixed(0)} ms`)
    expect(() => site.vm.forceSync('x')).toThrow(expect.objectContaining({ code: 'CONFLICT' }))
    // Holds come and go without bringing it back.
    await site.vm.suspend({ owner: 'qm', reason: 'resize', forMs: 60_000 })
    await site.vm.resume('qm')
    expect(site.state).toBe('fenced')
    const durableSeq = site.store.durableSeq
    await site.vm.stop(true)
    {
      // The plugin is started again: it does not even ask.
      await using next = site.keeper()
      await next.until('fenced')
      expect(next.states.map(({ is }) => is)).toEqual(['fenced'])
      // Another QEMU of the same VM.
      await using another = await startBusyVm(shape)
      await site.runs(another)
      await writesOn(another)
      await delay(1500)
      expect([next.state, await oursIn(another)]).toEqual(['fenced', { parts: [], bitmaps: [] }])
    }
    expect(site.store).toMatchObject({ epoch, durableSeq })
    await writesOn(vm)
  }, 120_000)
})

test('what a plugin left that was killed before it knew is taken out by the next one, once the recovery site says that it has taken over', async () => {
  await using vm = await startBusyVm('9.x')
  await using site = await ProtectedSite.start()
  await site.runs(vm)
  await using first = site.keeper()
  await first.until('streaming')
  await first.kill()
  await site.ingest.raiseGeneration('site-a', 'shop', 'failed over')
  expect((await oursIn(vm)).bitmaps).not.toEqual([])
  const { epoch } = site.store
  await using second = site.keeper()
  await second.until('fenced')
  await untilNothingOfOurs(vm)
  expect(second.states.map(({ is }) => is)).toEqual(['attaching', 'fenced'])
  // Killed again, with the fence on disk: it holds from the first look on.
  await second.kill()
  await using third = site.keeper()
  await third.until('fenced')
  expect(third.states.map(({ is }) => is)).toEqual(['fenced'])
  expect(site.store.epoch).toBe(epoch)
  await writesOn(vm)
}, 120_000)

test('a recovery site that has forgotten a handover gets nothing, and nothing of ours is put into QEMU', async () => {
  await using vm = await startBusyVm('9.x')
  await using site = await ProtectedSite.start({}, 2)
  await site.runs(vm)
  site.vm.start()
  await site.until(() => site.changes.filter(({ is }) => is === 'detached' || is === 'tracking').length >= 2)
  expect(site.changes.at(-1)?.why).toMatch(/^the recovery site has shop in generation 1, here it is in 2/)
  expect(site.ahead.length).toBeGreaterThan(0)
  expect(await oursIn(vm)).toEqual({ parts: [], bitmaps: [] })
  expect(site.registry.list()).toEqual([])
  expect(fenceOf(site.vmOptions, 2).standing).toBeUndefined()
  // Put right at the recovery site, it goes on by itself.
  await site.ingest.raiseGeneration('site-a', 'shop', 'put right')
  await site.until(() => site.state === 'streaming')
}, 120_000)
