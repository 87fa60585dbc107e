import { randomFillSync } from 'node:crypto'
import { open, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals'
import { SegmentSealer } from '../../agent/journal/index.ts'
import { FilePool, PageCache } from '../../agent/index/index.ts'
import { FrameCache, ReadGate, RecoveryPoint } from '../../agent/recovery/index.ts'
import { asList, asObject } from '../../core/qmp/index.ts'
import { NbdClient } from '../../core/nbd/index.ts'
import { until } from '../lab/sites.ts'
import { openWriteDoor } from './bare-load.ts'
import { startBareVm } from './bare-vm.ts'
import type { BareVm, VmShape } from './bare-vm.ts'
import { bootSector } from './boot-sector.ts'
import { ProtectedSite, VM_ID, makeIdentities } from './compared-site.ts'
import { oursIn } from './protected-site.ts'

// Delta sync, forced sync and online verify with real QEMU processes and a real agent.

const MiB = 1024 * 1024
const DISK_BYTES = 16 * MiB
const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())
let identities: Awaited<ReturnType<typeof makeIdentities>>
beforeAll(async () => {
  identities = await makeIdentities()
})

/** Data that do not repeat, and a third of it holes. */
const content = (): Buffer => {
  const bytes = randomFillSync(Buffer.alloc(DISK_BYTES))
  for (let at = 2 * MiB; at < DISK_BYTES; at += 3 * MiB) bytes.fill(0, at, at + MiB)
  return bytes
}

const put = async (path: string, bytes: Buffer, offsetBytes = 0): Promise<void> => {
  await using file = await open(path, 'r+')
  for (let at = 0; at < bytes.length; at += MiB) {
    const piece = bytes.subarray(at, at + MiB)
    if (!piece.equals(Buffer.alloc(piece.length))) await file.write(piece, 0, piece.length, offsetBytes + at)
  }
}

/** The disk as the recovery site has it. */
const replica = async (site: ProtectedSite): Promise<Buffer> => {
  const store = site.registry.get('site-a', String(VM_ID))?.store
  if (store === undefined) throw new Error('no store')
  await using files = new FilePool()
  await using point = await RecoveryPoint.open({ pages: new PageCache(MiB), frames: new FrameCache(16 * MiB), gate: new ReadGate(4), files, vmDirectory: store.directory, seq: store.durableSeq })
  const parts: Uint8Array[] = []
  for (let at = 0; at < DISK_BYTES; at += MiB) parts.push(...(await point.read(0, at, MiB)))
  return Buffer.concat(parts)
}

const exportsOf = (vm: BareVm): Promise<string[]> => vm.qmp(async (qmp) => asList(await qmp.execute('query-block-exports'), 'exports').map((one) => String(asObject(one, 'export')['id'])).filter((id) => id.startsWith('cdp-')))
const mirrorOf = (site: ProtectedSite): string => join(site.dir, `vms/site-a/${VM_ID}/mirror/0.raw`)
const flip = async (path: string, at: number): Promise<void> => {
  await using file = await open(path, 'r+')
  const byte = Buffer.alloc(1)
  await file.read(byte, 0, 1, at)
  await file.write(Buffer.of(byte[0] ^ 1), 0, 1, at)
}
/** What tells no event. */
const becomes = (what: string, done: () => Promise<boolean>): Promise<true> => until(what, 30_000, async () => (await done()) || undefined)

const shapes: readonly VmShape[] = ['8.4', '9.x']
describe.each(shapes)('a VM in the shape of %s', (shape) => {
  test.each(shape === '9.x' ? (['file', 'qcow2'] as const) : (['file'] as const))('whose QEMU was killed and started again is compared: what was written meanwhile is sent, and little else (mirror: %s)', async (mirrors) => {
    await using site = await ProtectedSite.start({ ...identities, sealer, mirrors })
    const bytes = content()
    {
      await using vm = await startBareVm({ shape, sizeBytes: DISK_BYTES })
      await put(vm.disks[0].path, bytes)
      await site.runs(vm)
      site.vm.start()
      await site.until(() => site.state === 'streaming')
    }
    await site.until(() => site.state === 'detached')
    bytes.fill(0x5a, 7 * MiB + 512, 7 * MiB + 1024)
    bytes.fill(0, 10 * MiB, 10 * MiB + 65_536)
    await using vm = await startBareVm({ shape, sizeBytes: DISK_BYTES })
    await put(vm.disks[0].path, bytes)
    await site.runs(vm)
    await site.until(() => site.state === 'streaming')
    expect(site.whys.slice(-2)).toEqual([expect.stringMatching(/^the VM was started; capture was not in step when the VM stopped \(.*\); no bitmap says what changed$/), 'delta sync complete, 131072 bytes sent'])
    expect((await replica(site)).equals(bytes)).toBe(true)
    expect(await exportsOf(vm)).toEqual([])
  }, 60_000)

  test('is verified while it streams: a flipped byte of the mirror is found, told, and healed; forced, all is compared again', async () => {
    await using site = await ProtectedSite.start({ ...identities, sealer })
    const bytes = content()
    await using vm = await startBareVm({ shape, sizeBytes: DISK_BYTES })
    await put(vm.disks[0].path, bytes)
    const door = await openWriteDoor(vm)
    site.existingNbdServers[VM_ID] = door
    await site.runs(vm)
    site.vm.start()
    await expect(site.vm.verify()).rejects.toMatchObject({ code: 'CONFLICT' })
    expect(() => site.vm.forceSync('x')).toThrow(expect.objectContaining({ code: 'CONFLICT' }))
    await site.until(() => site.state === 'streaming')
    expect(await site.vm.verify()).toMatchObject({ differences: [], differingBytes: 0, undecidedBytes: 0 })
    expect(await exportsOf(vm)).toEqual([])

    // Under writes it must not cry wolf.
    await using client = await NbdClient.connect({ path: door }, { exportName: vm.disks[0].key })
    let running = true
    const writing = (async () => {
      for (let n = 0; running; n++) {
        const at = (n * 37 * 4096) % (8 * MiB - 4096)
        const data = Buffer.alloc(4096, n % 251)
        data.copy(bytes, at)
        await client.write(at, data)
        await new Promise((resolve) => setTimeout(resolve, 1))
      }
    })()
    for (let round = 0; round < 3; round++) expect(await site.vm.verify()).toMatchObject({ differences: [], differingBytes: 0 })
    running = false
    await writing
    expect(site.changes.filter((is) => is === 'syncing')).toHaveLength(1)

    // Behind what the guest wrote to: there the journal would hide the mirror.
    const flipAt = 9 * MiB + 12_345
    await flip(mirrorOf(site), flipAt)
    expect((await replica(site)).equals(bytes)).toBe(false)
    const found = await site.vm.verify()
    expect(found).toMatchObject({ differingBytes: 65_536, differences: [{ disk: 0, offsetBytes: 9 * MiB, lengthBytes: 65_536 }] })
    expect(site.verified.at(-1)).toBe('scsi0 at 9437184 (65536 bytes)')
    await site.until(() => site.changes.filter((is) => is === 'syncing').length === 2 && site.state === 'streaming')
    expect(site.whys.slice(-2)).toEqual(['verify found 65536 bytes that differ: scsi0 at 9437184 (65536 bytes)', 'delta sync complete, 65536 bytes sent'])
    expect((await replica(site)).equals(bytes)).toBe(true)
    const syncs = site.changes.filter((is) => is === 'syncing').length
    site.vm.forceSync('forced by an operator')
    await site.until(() => site.changes.filter((is) => is === 'syncing').length === syncs + 1 && site.state === 'streaming')
    expect(site.whys.slice(-2)).toEqual(['forced by an operator', 'delta sync complete, 0 bytes sent'])
    expect((await readFile(vm.disks[0].path)).equals(bytes)).toBe(true)
    expect((await replica(site)).equals(bytes)).toBe(true)
    expect(await exportsOf(vm)).toEqual([])
  }, 120_000)

  test('its dirty bitmaps are rotated while a verify goes on, which comes to its end', async () => {
    await using site = await ProtectedSite.start({ ...identities, sealer, rotateEveryMs: 150, verifyRateBytesPerSec: 24 * MiB })
    await using vm = await startBareVm({ shape, sizeBytes: 72 * MiB, bootSector: bootSector({}) })
    await site.runs(vm)
    site.vm.start()
    await site.until(() => site.state === 'streaming')
    const bitmap = async (): Promise<string> => (await oursIn(vm)).bitmaps[0].name
    const verify = site.vm.verify()
    await becomes('a verify reads', async () => (await exportsOf(vm)).length > 0)
    const before = await bitmap()
    await becomes('another bitmap records', async () => (await bitmap()) !== before)
    expect(site.vm.verifying).toBeDefined()
    expect(await verify).toMatchObject({ differingBytes: 0 })
    expect(await exportsOf(vm)).toEqual([])
  }, 60_000)

  test('a comparison that is cut off goes on where it was; a verify that is cut off leaves no export', async () => {
    await using site = await ProtectedSite.start({ ...identities, sealer, syncRateBytesPerSec: 2 * MiB, verifyRateBytesPerSec: MiB })
    const bytes = content()
    await using vm = await startBareVm({ shape, sizeBytes: DISK_BYTES })
    await put(vm.disks[0].path, bytes)
    await site.runs(vm)
    site.vm.start()
    await site.until(() => site.state === 'streaming')
    const verify = site.vm.verify()
    verify.catch(() => undefined)
    await becomes('a verify reads', async () => (await exportsOf(vm)).length > 0)
    site.vm.forceSync('forced by an operator')
    await expect(verify).rejects.toMatchObject({ code: 'ABORTED' })
    await becomes('the progress is kept', async () => (JSON.parse(await readFile(join(site.dir, `state/vm-${VM_ID}.json`), 'utf8')) as { progress?: Record<string, number> }).progress?.['0'] !== undefined)
    // Another attach takes the journal: this one has no future, and capture lets go.
    const store = site.registry.get('site-a', String(VM_ID))?.store
    await store?.beginEpoch(store.disks)
    await site.until(() => site.state === 'tracking')
    await site.until(() => site.state === 'streaming')
    expect(site.whys.at(-2)).toMatch(/^comparison goes on: .*newer attach/)
    expect(site.whys.at(-1)).toBe('delta sync complete, 0 bytes sent')
    expect((await replica(site)).equals(bytes)).toBe(true)
    expect(await exportsOf(vm)).toEqual([])
  }, 120_000)
})
