import { setTimeout as pause } from 'node:timers/promises'
import { describe, expect, test } from '@jest/globals'
import { RecordKind } from '../../core/record/index.ts'
import { readCounters } from '../../plugin/qemu/index.ts'
import { Random, testSeed } from '../kit/random.ts'
import { startBareVm } from './bare-vm.ts'
import type { BareVm, VmShape } from './bare-vm.ts'
import { bootSector, bootWriteBytes } from './boot-sector.ts'
import { ProtectedSite, oursIn } from './protected-site.ts'

// The dirty bitmaps while streaming, with real QEMU processes, a real agent and a plugin that is killed.

const MiB = 1024 * 1024
const ROUNDS = 4
const shapes: readonly VmShape[] = ['8.4', '9.x']

const untilBitmaps = async (vm: BareVm, done: (bitmaps: Awaited<ReturnType<typeof oursIn>>['bitmaps']) => boolean): Promise<void> => {
  const endsAtMs = performance.now() + 20_000
  for (;;) {
    const { bitmaps } = await oursIn(vm)
    if (done(bitmaps)) return
    if (performance.now() > endsAtMs) throw new Error(`the bitmaps stay ${JSON.stringify(bitmaps)}`)
    await pause(50)
  }
}

/** What syncs have put into the journal from that record on. */
const syncedBytes = async (site: ProtectedSite, fromSeq: number): Promise<number> => {
  let bytes = 0
  for (const { segmentNumber } of site.store.segments) {
    for await (const { table } of site.store.recordsOf(segmentNumber, { fromSeq })) {
      for (let index = 0; index < table.count; index++) {
        const kind = table.kind(index)
        if (kind === RecordKind.sync || kind === RecordKind.syncZero) bytes += table.lengthBytes(index)
      }
    }
  }
  return bytes
}

describe.each(shapes)('bitmaps in the shape of %s', (shape) => {
  test('hold what was written since the last rotation, and a plugin that was killed copies no more', async () => {
    const writes = 2000
    await using vm = await startBareVm({ shape, sizeBytes: 72 * MiB, bootSector: bootSector({ writes }) })
    await using site = await ProtectedSite.start({ rotateEveryMs: 500 })
    await site.runs(vm)
    await using plugin = site.keeper()
    await plugin.until('streaming')
    const written = async (): Promise<number> => (await vm.qmp(readCounters)).get('scsi0')?.wrBytes ?? 0
    for (let before = -1; before !== (await written()) || before < (writes * bootWriteBytes) / 2; await pause(300)) before = await written()
    await untilBitmaps(vm, (bitmaps) => bitmaps.length === 1 && bitmaps[0].recording && bitmaps[0].dirtyBytes === 0)
    // Nothing is written: nothing is rotated.
    const [before] = (await oursIn(vm)).bitmaps
    await pause(1200)
    expect((await oursIn(vm)).bitmaps).toEqual([before])
    await plugin.kill()
    const fromSeq = site.store.durableSeq + 1
    site.vm.start()
    await site.until(() => site.state === 'streaming')
    expect(site.changes.find(({ is }) => is === 'syncing')).toMatchObject({ kind: 'bitmap' })
    expect(await site.replicaEquals({ scsi0: vm.disks[0].path })).toEqual({ scsi0: true })
    expect(await syncedBytes(site, fromSeq)).toBeLessThan(MiB)
  }, 120_000)

  test('a plugin that is killed at any moment, over and over, misses nothing', async () => {
    const seed = testSeed()
    console.log(`seed ${seed}`)
    const random = new Random(seed)
    await using vm = await startBareVm({ shape, sizeBytes: 72 * MiB, bootSector: bootSector({}) })
    await using site = await ProtectedSite.start({ rotateEveryMs: 150 })
    await site.runs(vm)
    for (let round = 0; round < ROUNDS; round++) {
      await using plugin = site.keeper()
      await plugin.until('streaming')
      await pause(random.int(0, 700))
      await plugin.kill()
      expect(plugin.states.filter((state) => state.is === 'syncing').map((state) => state.is === 'syncing' && state.kind)).toEqual([round === 0 ? 'initial' : 'bitmap'])
    }
    site.vm.start()
    await site.until(() => site.state === 'streaming')
    await vm.qmp((qmp) => qmp.execute('stop'))
    expect(await site.replicaEquals({ scsi0: vm.disks[0].path })).toEqual({ scsi0: true })
  }, 120_000)
})
