import { randomFillSync } from 'node:crypto'
import { open } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { FilePool, PageCache } from '../../agent/index/index.ts'
import { SegmentSealer } from '../../agent/journal/index.ts'
import { FrameCache, ReadGate, RecoveryPoint } from '../../agent/recovery/index.ts'
import { ScrubKeeper } from '../../agent/scrub/index.ts'
import { EventLog } from '../../core/api/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { startBareVm } from './bare-vm.ts'
import { makeIdentities, ProtectedSite, VM_ID } from './compared-site.ts'

const MiB = 1024 * 1024
const DISK_BYTES = 8 * MiB
const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())

/** The disk as the recovery site has it now. */
const replica = async (site: ProtectedSite): Promise<Buffer> => {
  const store = site.registry.get('site-a', String(VM_ID))?.store
  if (store === undefined) throw new Error('no store')
  await using files = new FilePool()
  await using point = await RecoveryPoint.open({ pages: new PageCache(MiB), frames: new FrameCache(16 * MiB), gate: new ReadGate(4), files, vmDirectory: store.directory, seq: store.durableSeq })
  return Buffer.concat(await point.read(0, 0, DISK_BYTES))
}

test('a byte of a mirror that is not what it was is found by the scrub and read by nobody; the agent asks, and the source of a real QEMU writes it again', async () => {
  await using site = await ProtectedSite.start({ ...(await makeIdentities()), sealer })
  const bytes = randomFillSync(Buffer.alloc(DISK_BYTES)).fill(0, 2 * MiB, 3 * MiB)
  await using vm = await startBareVm({ shape: '9.x', sizeBytes: DISK_BYTES })
  await using image = await open(vm.disks[0].path, 'r+')
  await image.write(bytes, 0, bytes.length, 0)
  await site.runs(vm)
  site.vm.start()
  await site.until(() => site.state === 'streaming')
  const asked: [string, string, string][] = []
  const events = new EventLog()
  await using scrub = new ScrubKeeper({
    vms: () => site.registry.list(), catalogue: site.catalogue, events, log: silentLogger, everyMs: 0, rateBytesPerSec: 1e12, nowUnixMs: Date.now, lookEveryMs: 1 << 30,
    askForSync: (...question) => asked.push(question) > 0,
  })
  const pass = async (): Promise<void> => {
    await scrub.want(site.registry.list())
    await scrub.round()
  }
  await pass()
  expect(events.recent()).toEqual([])
  await using mirror = await open(join(site.dir, `vms/site-a/${VM_ID}/mirror/0.raw`), 'r+')
  await mirror.write(Buffer.of(bytes[5 * MiB + 7] ^ 1), 0, 1, 5 * MiB + 7)
  await pass()
  expect(events.recent()).toMatchObject([{ kind: 'scrub.damage', level: 'error', context: { disk: 0, offsetBytes: 5 * MiB, lengthBytes: 65_536 } }])
  await expect(replica(site)).rejects.toMatchObject({ code: 'JOURNAL_DAMAGED' })
  expect(asked).toHaveLength(1)

  const before = site.whys.length
  expect(site.ingest.askForSync(...asked[0])).toBe(true)
  await site.until(() => site.whys.slice(before).some((why) => why.startsWith('delta sync complete')))
  expect(site.whys.slice(before)[0]).toContain('the recovery site asks for it: its copy is damaged (1 range)')
  expect(site.whys.at(-1)).toBe('delta sync complete, 65536 bytes sent')
  expect((await replica(site)).equals(bytes)).toBe(true)
}, 120_000)
