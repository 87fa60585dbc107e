import { copyFile } from 'node:fs/promises'
import { describe, expect, test } from '@jest/globals'
import type { ProtectedVm } from '../../plugin/protect/protected-vm.ts'
import { until } from '../lab/sites.ts'
import { openWriteDoor, sameContent } from './bare-load.ts'
import { bootSector } from './boot-sector.ts'
import { startBareVm } from './bare-vm.ts'
import type { BareVm } from './bare-vm.ts'
import { ProtectedSite, VM_ID, oursIn } from './protected-site.ts'
import * as proxmox from './proxmox-commands.ts'
import { StampWriter, readInstant } from './stamp-writer.ts'
import type { StampTarget } from './stamp-writer.ts'

// Incremental rounds (docs/decisions/incremental-rounds.md): a VM with two disks in the shape of 8.4 that lost capture while it is being backed up. The guest's writes are
// those of a writer whose every instant can be told from the disks; each checkpoint of a round must be one.

const MiB = 1024 * 1024
const SIZE_BYTES = 16 * MiB
const KEYS = ['scsi0', 'scsi1']

const eventually = (what: string, done: () => boolean | Promise<boolean>): Promise<true> => until(what, 90_000, async () => (await done()) || undefined)

type Rig = AsyncDisposable & { vm: BareVm; site: ProtectedSite; writer: StampWriter }

const start = async (): Promise<Rig> => {
  await using stack = new AsyncDisposableStack()
  const vm = stack.use(await startBareVm({ shape: '8.4', diskCount: 2, sizeBytes: SIZE_BYTES }))
  const door = await openWriteDoor(vm)
  const site = stack.use(await ProtectedSite.start({ roundEveryMs: 300, existingNbdServers: { [VM_ID]: door } }))
  const writer = stack.use(await StampWriter.open(KEYS.map((key) => ({ key, socketPath: door, exportName: key }))))
  await site.runs(vm)
  const done = stack.move()
  return { vm, site, writer, [Symbol.asyncDispose]: () => done[Symbol.asyncDispose]() }
}

const roundsOf = ({ state }: ProtectedVm): number => (state.is === 'tracking' ? (state.rounds?.count ?? -1) : -1)

/** Backups of both disks that take a minute or longer if nobody ends or hurries them. */
const backUp = async (vm: BareVm, path?: (key: string) => string): Promise<proxmox.Backup> => {
  const backups: proxmox.Backup[] = []
  for (const { key, sizeBytes } of vm.disks) backups.push(await proxmox.startBackup(vm, key, { sizeBytes, bytesPerSec: SIZE_BYTES / 128, ...(path === undefined ? {} : { path: path(key) }) }))
  const all = (work: (backup: proxmox.Backup) => Promise<unknown>) => async (): Promise<void> => void (await Promise.all(backups.map(work)))
  return { end: all((one) => one.end()), done: all((one) => one.done()), hurry: all((one) => one.hurry()) }
}

/** The numbers that the disks of a checkpoint stand at; it must be valid. */
const recovered = async (site: ProtectedSite, id: string): Promise<number[]> => {
  const entry = site.catalogue.find('site-a', 'shop', id)
  if (entry === undefined) throw new Error(`no checkpoint ${id}`)
  const point = await site.points.openPoint({ pointId: `of-${id}`, vms: [{ vm: String(VM_ID), vmDirectory: site.store.directory, seq: entry.namedSeqs[String(VM_ID)] }] })
  try {
    return await readInstant(KEYS.map((key): StampTarget => {
      const uri = new URL(point.disks.find((disk) => disk.key === key)?.uri ?? '')
      return { key, socketPath: uri.searchParams.get('socket') ?? '', exportName: uri.pathname.slice(1) }
    }))
  } finally {
    await site.points.closePoint(`of-${id}`)
  }
}

const checkpointsOf = (site: ProtectedSite, prefix: string): string[] => site.catalogue.list('site-a', 'shop', { limit: 1000 }).map(({ id }) => id).filter((id) => id.startsWith(prefix)).reverse()

/** After the backup: in step by a bitmap sync, a checkpoint can be cut, and with the writer at rest the replica is the source. */
const comesInStep = async ({ vm, site, writer }: Rig): Promise<void> => {
  const from = site.changes.length
  await site.until(() => site.state === 'streaming')
  expect(site.changes.slice(from - 2).flatMap((state) => (state.is === 'syncing' ? [state.kind] : []))).toEqual(['bitmap'])
  expect(await site.cut('after')).toBe(true)
  await writer.pause()
  expect(await site.replicaEquals(Object.fromEntries(vm.disks.map(({ key, path }) => [key, path])))).toEqual({ scsi0: true, scsi1: true })
}

describe('8.4, while a backup is in the way of capture', () => {
  test('each round is a checkpoint of one instant over both disks; the backup holds what it should; then capture is attached again', async () => {
    await using rig = await start()
    const { vm, site, writer } = rig
    const first = site.another()
    first.start()
    await site.until(() => first.state.is === 'streaming')
    writer.run(200)
    await writer.more(150)
    await first.stop(true)
    await writer.more(50)
    await writer.pause()
    const archive = (key: string): string => `${vm.dir}/${key}.archive`
    const before = (key: string): string => `${vm.dir}/${key}.before`
    for (const { key, path } of vm.disks) await copyFile(path, before(key))
    // Faster than the others, so that the whole of it is done.
    const backup = await backUp(vm, archive)
    writer.run(200)
    site.vm.start()
    await eventually('four rounds', () => roundsOf(site.vm) >= 4)
    expect(site.vm.state).toMatchObject({ is: 'tracking', why: 'waiting for the end of a backup: incremental rounds', rounds: { lastUnixMs: expect.any(Number) } })
    await writer.more(1)
    const acked = writer.acked
    const ids = checkpointsOf(site, 'r').slice(0, 4)
    const instants: number[] = []
    for (const id of ids) instants.push((await recovered(site, id))[0])
    expect(instants).toEqual(instants.toSorted((one, other) => one - other))
    expect(new Set(instants).size).toBe(instants.length)
    expect(instants[0]).toBeGreaterThanOrEqual(200)
    expect(instants.at(-1)).toBeLessThanOrEqual(acked + 1)
    await backup.hurry()
    await backup.done()
    for (const key of KEYS) expect(await sameContent(archive(key), before(key))).toBe(true)
    await comesInStep(rig)
    // The rounds of before are what they were.
    expect((await recovered(site, ids[0]))[0]).toBe(instants[0])
    expect((await oursIn(vm)).parts.filter((name) => name.startsWith('cdp-round'))).toEqual([])
  }, 120_000)

  test('the plugin is killed in the middle of a round: the guest does not notice, nothing of that round is a checkpoint, the next plugin goes on', async () => {
    await using rig = await start()
    const { vm, site, writer } = rig
    const first = site.another()
    first.start()
    await site.until(() => first.state.is === 'streaming')
    await first.stop(true)
    writer.run(200)
    await writer.more(150)
    const backup = await backUp(vm)
    await using second = site.keeper({ syncRateBytesPerSec: 2 * MiB })
    const jobs = (): Promise<{ id: string; 'current-progress': number; status: string }[]> => vm.qmp(async (qmp) => (await qmp.execute('query-jobs')) as never)
    await eventually('the middle of a round', async () => (await jobs()).some((job) => job.id === 'cdp-round-job-scsi0' && job.status === 'running' && job['current-progress'] > 0))
    await second.kill()
    await writer.more(120)
    const half = checkpointsOf(site, 'k')
    site.vm.start()
    await eventually('two rounds', () => roundsOf(site.vm) >= 2)
    const ids = checkpointsOf(site, 'r')
    for (const id of ids) await recovered(site, id)
    expect(checkpointsOf(site, 'k')).toEqual(half)
    for (const id of half) await recovered(site, id)
    await backup.end()
    await comesInStep(rig)
  }, 120_000)

  test('the backup ends in the middle of a round: that round is a checkpoint still', async () => {
    await using rig = await start()
    const { vm, site, writer } = rig
    const first = site.another()
    first.start()
    await site.until(() => first.state.is === 'streaming')
    writer.run(200)
    await writer.more(10)
    await first.stop(true)
    await writer.more(150)
    const backup = await backUp(vm)
    const slow = site.another({ syncRateBytesPerSec: 4 * MiB })
    slow.start()
    await eventually('a round', async () => (await oursIn(vm)).parts.includes('cdp-round-job-scsi0'))
    const acked = writer.acked
    await backup.end()
    await site.until(() => slow.state.is === 'streaming')
    const [id] = checkpointsOf(site, 'r')
    const [instant] = await recovered(site, id)
    expect(instant).toBeLessThanOrEqual(acked + 1)
    expect((await oursIn(vm)).parts.filter((name) => name.startsWith('cdp-round'))).toEqual([])
    await writer.pause()
    await slow.stop(true)
  }, 120_000)

  test('suspended in the middle of a round, everything of it is out of QEMU; and it begins again', async () => {
    await using rig = await start()
    const { vm, site, writer } = rig
    const first = site.another()
    first.start()
    await site.until(() => first.state.is === 'streaming')
    await first.stop(true)
    writer.run(200)
    await writer.more(150)
    const backup = await backUp(vm)
    const slow = site.another({ syncRateBytesPerSec: 2 * MiB })
    slow.start()
    await eventually('a round', async () => (await oursIn(vm)).parts.includes('cdp-round-job-scsi0'))
    await slow.suspend({ owner: 'qm', reason: 'snapshot', forMs: 60_000 })
    expect((await oursIn(vm)).parts).toEqual([])
    await slow.resume('qm')
    await eventually('a round again', async () => (await oursIn(vm)).parts.includes('cdp-round-job-scsi0'))
    await slow.stop(true)
    expect((await oursIn(vm)).parts).toEqual([])
    await writer.more(10)
    await backup.end()
    await writer.pause()
  }, 120_000)

  test('capture was attached when the backup began, and the plugin is killed: its job stands in QEMU, so there are no rounds, and the bitmaps say what to copy then', async () => {
    await using vm = await startBareVm({ shape: '8.4', sizeBytes: 72 * MiB, bootSector: bootSector({}) })
    await using site = await ProtectedSite.start({ roundEveryMs: 300 })
    await site.runs(vm)
    await using first = site.keeper()
    await first.until('streaming')
    const backup = await backUp(vm)
    await first.kill()
    site.vm.start()
    await eventually('waiting', () => site.vm.state.is === 'tracking' && site.vm.state.why.includes('waits for the end of a backup'))
    const { parts } = await oursIn(vm)
    expect(parts).toEqual(expect.arrayContaining(['cdp-job-scsi0', 'cdp-shield-scsi0']))
    expect(roundsOf(site.vm)).toBe(-1)
    // So its group cannot be deleted now: the job would stay for as long as QEMU lives.
    await expect(site.vm.mustBeTakeable()).rejects.toMatchObject({ code: 'CONFLICT', message: expect.stringContaining('scsi0') })
    await backup.end()
    await site.until(() => site.state === 'streaming')
    await site.vm.mustBeTakeable()
    expect(checkpointsOf(site, 'r')).toEqual([])
    expect(site.changes.flatMap((state) => (state.is === 'syncing' ? [state.kind] : []))).toEqual(['bitmap'])
    await vm.qmp((qmp) => qmp.execute('stop'))
    expect(await site.replicaEquals({ scsi0: vm.disks[0].path })).toEqual({ scsi0: true })
  }, 120_000)
})
