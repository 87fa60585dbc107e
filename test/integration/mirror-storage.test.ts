import { execFile, spawn } from 'node:child_process'
import { hash } from 'node:crypto'
import { once } from 'node:events'
import { mkdir, mkdtemp, readFile, readdir, readlink, rm, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { promisify } from 'node:util'
import { afterEach, beforeEach, describe, expect, jest, test } from '@jest/globals'
import { FilePool, PageCache } from '../../agent/index/index.ts'
import { hashExtents, openExtentReader } from '../../agent/hashes/index.ts'
import { mirrorHasData } from '../../agent/mirror/index.ts'
import { FrameCache, ReadGate } from '../../agent/recovery/index.ts'
import type { CdpError } from '../../core/errors/index.ts'
import { HashMark } from '../../core/stream/index.ts'
import { waitForEnd } from '../lab/process.ts'
import { SmallDisk } from '../lab/small-disk.ts'
import { LoopDevice } from '../kit/loop-device.ts'
import { KINDS, MirrorSite } from '../kit/mirror-site.ts'
import { Random, testSeed } from '../kit/random.ts'

const run = promisify(execFile)
jest.setTimeout(90_000)
const MIB = 1024 * 1024
const EXTENT_BYTES = 65_536
const random = new Random(testSeed())
console.log(`seed ${random.seed}`)
let directory = ''
beforeEach(async () => {
  directory = await mkdtemp('/tmp/cdp-ms-')
})
afterEach(() => rm(directory, { recursive: true, force: true }))
const vmDirectory = (): string => join(directory, 'site/101')

const hashesOf = async (site: MirrorSite, seq: number, disk: number): Promise<string[]> => {
  await using files = new FilePool(8)
  await using reader = await openExtentReader(site.directory, seq, { pages: new PageCache(1 << 20), frames: new FrameCache(4 << 20), gate: new ReadGate(2), files })
  const extentCount = site.models[disk].length / EXTENT_BYTES
  const { marks, hashes } = await hashExtents(reader, { disk, offsetBytes: 0, extentBytes: EXTENT_BYTES, extentCount })
  let at = 0
  return Array.from(marks, (mark) => {
    if (mark !== HashMark.hash) return mark === HashMark.zero ? 'zero' : 'unknown'
    at += 32
    return hashes.subarray(at - 32, at).toString('hex')
  })
}

const expectedHashes = (model: Buffer): string[] =>
  Array.from({ length: model.length / EXTENT_BYTES }, (_, index) => {
    const extent = model.subarray(index * EXTENT_BYTES, (index + 1) * EXTENT_BYTES)
    return extent.every((byte) => byte === 0) ? 'zero' : hash('sha256', extent, 'hex')
  })

/** As the retention keeper: the same again until it works. */
const promoteAgain = async (site: MirrorSite, seq: number): Promise<void> => {
  const untilMs = performance.now() + 60_000
  for (;;) {
    try {
      return await site.store.base.promote(seq)
    } catch (error) {
      if (performance.now() > untilMs) throw error
      await delay(100) // nothing tells that the storage is back
    }
  }
}

/** Processes that work in a directory. */
const processesIn = async (path: string): Promise<number[]> => {
  const pids = (await readdir('/proc')).map(Number).filter((pid) => Number.isInteger(pid) && pid !== process.pid)
  const places = await Promise.all(pids.map((pid) => readlink(`/proc/${pid}/cwd`).catch(() => undefined)))
  return pids.filter((_, index) => places[index] === path)
}

describe.each(KINDS)('mirrors of kind %s', (kind) => {
  test('read as they were written, zeroed and grown, also behind their end, and refuse what is outside', async () => {
    await using site = await MirrorSite.make(vmDirectory(), kind, random)
    const { storage } = site
    const [disk] = site.disks
    const model = Buffer.alloc(6 * MIB)
    const read = async (mirror: { read(offsetBytes: number, target: Buffer): Promise<void> }): Promise<boolean> => {
      const target = Buffer.alloc(model.length, 0xee)
      await mirror.read(0, target)
      return target.equals(model)
    }
    await storage.check([disk])
    {
      await using mirror = await storage.open(disk)
      await mirror.zero(0, disk.sizeBytes)
      await mirror.write(MIB - 512, [Buffer.alloc(512, 1), Buffer.alloc(4096, 2)], 4608)
      model.fill(1, MIB - 512, MIB).fill(2, MIB, MIB + 4096)
      await mirror.write(2 * MIB, [Buffer.alloc(MIB, 3)], MIB)
      await mirror.zero(2 * MIB + 512, 100 * 512)
      model.fill(3, 2 * MIB, 3 * MIB).fill(0, 2 * MIB + 512, 2 * MIB + 101 * 512)
      expect(mirror.dirty).toBe(true)
      expect(await read(mirror)).toBe(true)
      await expect(mirror.write(4 * MIB - 512, [Buffer.alloc(1024)], 1024)).rejects.toMatchObject({ code: 'BAD_INPUT' })
      await expect(mirror.zero(4 * MIB, 512)).rejects.toMatchObject({ code: 'BAD_INPUT' })
      await mirror.datasync()
      expect(mirror.dirty).toBe(false)
      await mirror.grow(5 * MIB)
      expect(mirror.sizeBytes).toBe(5 * MIB)
      expect(await read(mirror)).toBe(true)
      await mirror.write(5 * MIB - 512, [Buffer.alloc(512, 4)], 512)
      model.fill(4, 5 * MIB - 512, 5 * MIB)
      await mirror.datasync()
    }
    expect([await storage.exists(0), await storage.exists(1), await storage.kindOf(disk)]).toEqual([true, false, kind])
    await using again = await storage.open({ disk: 0, sizeBytes: MIB })
    expect(again.sizeBytes).toBe(5 * MIB)
    expect(await read(again)).toBe(true)
    if (kind !== 'qcow2') return
    const { stdout } = await run('qemu-img', ['info', '-U', '--output=json', join(site.directory, 'scsi0.qcow2')])
    expect((JSON.parse(stdout) as { 'virtual-size': number })['virtual-size']).toBe(5 * MIB)
    // What is zeroed takes no room.
    expect((await stat(join(site.directory, 'scsi0.qcow2'))).blocks * 512).toBeLessThan(2.5 * MIB)
  })

  test('hold a first copy that was interrupted, compare by hash, are promoted, grow, and are read after a restart', async () => {
    await using site = await MirrorSite.make(vmDirectory(), kind, random)
    await site.attach()
    site.copyAll()
    await site.store.flush()
    site.write(20, true)
    await site.store[Symbol.asyncDispose]()
    await site.open()
    await site.attach()
    expect(await mirrorHasData(site.directory, site.disks)).toBe(true)
    site.copyAll()
    site.write(20, true)
    await site.store.flush()
    for (const { disk } of site.disks) expect(await hashesOf(site, 0, disk)).toEqual(expectedHashes(site.models[disk]))
    site.endCopy()
    await site.store.flush()
    const first = { seq: site.nextSeq - 1, models: site.snapshot() }
    const middle = { seq: site.write(60), models: site.snapshot() }
    site.grow(1, 4 * MIB + 512 * 1024)
    const last = { seq: site.write(60), models: site.snapshot() }
    await site.store.flush()
    for (const { seq, models } of [first, middle, last]) expect(await site.differences(seq, models)).toEqual([])
    await site.store.base.promote(middle.seq)
    for (const { seq, models } of [middle, last]) expect(await site.differences(seq, models)).toEqual([])
    await site.store.base.promote(last.seq)
    await site.store.base.trim()
    expect(await hashesOf(site, last.seq, 1)).toEqual(expectedHashes(last.models[1]))
    await site.store[Symbol.asyncDispose]()
    await site.open()
    expect(await site.differences(last.seq, last.models)).toEqual([])
  })
})

describe.each(['qcow2', 'device'] as const)('the storage daemon of a %s', (kind) => {
  const ready = async (how: Parameters<typeof MirrorSite.make>[3] = {}): Promise<MirrorSite> => {
    const site = await MirrorSite.make(vmDirectory(), kind, random, how)
    await site.attach()
    site.copyAll()
    site.endCopy()
    await site.store.flush()
    return site
  }

  test('is killed in the middle of a promotion: the journal goes on, what was acknowledged stays, and the promotion ends later', async () => {
    await using site = await ready()
    const middle = { seq: site.write(150), models: site.snapshot() }
    await site.store.flush()
    let killed = false
    const broken = site.store.base.promote(middle.seq, {
      batchBytes: 256 * 1024,
      pace: async () => {
        if (!killed) process.kill(site.storage.daemonPid ?? 0, 'SIGKILL')
        killed = true
      },
    })
    await expect(broken).rejects.toMatchObject({ code: 'IO', hint: expect.any(String) })
    expect(killed).toBe(true)
    const last = { seq: site.write(60), models: site.snapshot() }
    await site.store.flush()
    expect([site.store.condition, site.store.durableSeq]).toEqual(['open', last.seq])
    expect(await site.differences(middle.seq, middle.models)).toEqual([])
    await promoteAgain(site, middle.seq)
    expect(await site.differences(middle.seq, middle.models)).toEqual([])
    await site.store.base.promote(last.seq)
    await site.store.base.trim()
    expect(await site.differences(last.seq, last.models)).toEqual([])
  })

  test('ends with the agent, and the next agent goes on with the promotion', async () => {
    await using site = await ready()
    const last = { seq: site.write(150), models: site.snapshot() }
    await site.store.flush()
    await site.store[Symbol.asyncDispose]()
    const child = spawn(process.execPath, [join(import.meta.dirname, '../crash/promotion-writer.ts'), site.directory, String(last.seq), 'site/101'], { stdio: ['ignore', 'pipe', 'inherit'], env: { ...process.env, NODE_OPTIONS: '' } })
    const exited = once(child, 'exit')
    // In the middle of it, and it stays there.
    await new Promise<void>((resolve) => child.stdout.on('data', (chunk: Buffer) => chunk.includes('batch') && child.kill('SIGSTOP') && resolve()))
    const daemons = await processesIn(join(site.directory, 'mirror'))
    expect(daemons).toHaveLength(1)
    child.kill('SIGKILL')
    await exited
    expect(await waitForEnd(daemons[0], 10_000)).toBe(true)
    await site.open()
    expect(await site.differences(last.seq, last.models)).toEqual([])
    await promoteAgain(site, last.seq)
    await site.store.base.trim()
    expect(await site.differences(last.seq, last.models)).toEqual([])
  })

  test('hangs: it is given up after the deadline, another one takes its place', async () => {
    await using site = await ready({ deadlineMs: 3000 })
    const last = { seq: site.write(60), models: site.snapshot() }
    await site.store.flush()
    const pid = site.storage.daemonPid ?? 0
    process.kill(pid, 'SIGSTOP')
    await expect(site.store.base.promote(last.seq)).rejects.toMatchObject({ code: expect.stringMatching(/^(TIMEOUT|IO)$/) })
    await promoteAgain(site, last.seq)
    expect(site.storage.daemonPid).not.toBe(pid)
    await site.store.base.trim()
    expect(await site.differences(last.seq, last.models)).toEqual([])
  })
})

test('a device with sectors of 4 KiB takes writes of 512 bytes', async () => {
  await using site = await MirrorSite.make(vmDirectory(), 'device', random, { sectorBytes: 4096, diskBytes: MIB })
  await site.attach()
  site.copyAll()
  site.write(50, true)
  site.endCopy()
  await site.store.flush()
  expect(await site.differences(site.nextSeq - 1, site.snapshot())).toEqual([])
})

test('the file system below a qcow2 is full: the store is, nothing acknowledged is lost, and with room the copy goes on', async () => {
  await using small = await SmallDisk.mount(join(directory, 'small'), 24 * MIB)
  await using site = await MirrorSite.make(vmDirectory(), 'qcow2', random, { storageDirectory: small.path })
  await site.attach()
  await small.fill()
  const stopped = new Promise<CdpError>((resolve) => {
    site.store.onStopped = resolve
  })
  site.copyAll()
  expect(await stopped).toMatchObject({ context: { condition: 'full' }, hint: expect.stringContaining('space') })
  expect(site.store.condition).toBe('full')
  small.empty()
  await site.attach()
  site.copyAll()
  site.endCopy()
  await site.store.flush()
  expect(site.store.condition).toBe('open')
  expect(await site.differences(site.nextSeq - 1, site.snapshot())).toEqual([])
  const { stdout } = await run('qemu-img', ['info', '-U', '--output=json', join(small.path, 'scsi0.qcow2')])
  expect(JSON.parse(stdout)).toMatchObject({ format: 'qcow2', 'virtual-size': 4 * MIB })
})

test('a device too small to grow into stops the promotion with a hint; extended, it goes on', async () => {
  await using site = await MirrorSite.make(vmDirectory(), 'device', random, { diskBytes: MIB })
  await site.attach()
  site.copyAll()
  site.endCopy()
  site.grow(0, 3 * MIB)
  const last = { seq: site.write(60), models: site.snapshot() }
  await site.store.flush()
  await expect(site.store.base.promote(last.seq)).rejects.toMatchObject({ code: 'CONFLICT', hint: `Let the volume grow by at least ${MIB} bytes.` })
  expect(await site.differences(last.seq, last.models)).toEqual([])
  await expect(site.attach()).rejects.toMatchObject({ code: 'CONFLICT' })
  expect(site.store.condition).toBe('open')
  await site.devices[0].grow(4 * MIB)
  await promoteAgain(site, last.seq)
  expect(await site.differences(last.seq, last.models)).toEqual([])
})

describe('a choice that cannot be is refused, with a hint, before anything changes', () => {
  const refused = async (site: MirrorSite, expected: object): Promise<void> => {
    await expect(site.attach()).rejects.toMatchObject({ hint: expect.any(String), ...expected })
    expect([site.store.condition, site.store.epoch]).toEqual(['open', 0])
    expect(await readdir(join(site.directory, 'mirror')).catch(() => [])).toEqual([])
  }

  test('no such device, no block device, too small, mounted, foreign, one for two disks', async () => {
    await using site = await MirrorSite.make(vmDirectory(), 'file', random)
    const choose = (path: string): void => void site.specs.set('scsi1', { kind: 'device', path })
    choose('/dev/cdp-no-such')
    await refused(site, { code: 'NOT_FOUND' })
    await writeFile(join(directory, 'plain'), '')
    choose(join(directory, 'plain'))
    await refused(site, { code: 'BAD_INPUT' })
    await using tiny = await LoopDevice.attach(join(directory, 'tiny'), MIB)
    choose(tiny.path)
    await refused(site, { code: 'CONFLICT', message: expect.stringContaining(`${MIB} bytes`) })
    await using foreign = await LoopDevice.attach(join(directory, 'foreign'), 8 * MIB)
    choose(foreign.path)
    await run('mkfs.ext4', ['-q', foreign.path])
    await refused(site, { code: 'CONFLICT', message: expect.stringContaining('holds something'), hint: expect.stringContaining('claim') })
    site.specs.set('scsi1', { kind: 'device', path: foreign.path, claim: true })
    await mkdir(join(directory, 'mnt'))
    await run('mount', [foreign.path, join(directory, 'mnt')])
    try {
      await refused(site, { code: 'CONFLICT', message: expect.stringContaining('in use') })
    } finally {
      await run('umount', [join(directory, 'mnt')])
    }
    await site.attach()
    // It cannot be taken from under us.
    await expect(run('mount', [foreign.path, join(directory, 'mnt')])).rejects.toThrow()
  })

  test('a qcow2 that is there is taken only if it is claimed, and a preseed is for files', async () => {
    await using site = await MirrorSite.make(vmDirectory(), 'file', random)
    const path = join(directory, 'there.qcow2')
    await run('qemu-img', ['create', '-q', '-f', 'qcow2', path, String(8 * MIB)])
    site.specs.set('scsi0', { kind: 'qcow2', path })
    await refused(site, { code: 'CONFLICT', message: expect.stringContaining('holds something') })
    site.specs.set('scsi0', { kind: 'qcow2', path, claim: true })
    await refused(site, { code: 'CONFLICT', message: expect.stringContaining('larger') })
    await rm(path)
    await mkdir(join(site.directory, 'preseed'))
    await writeFile(join(site.directory, 'preseed/scsi0.raw'), Buffer.alloc(512))
    await refused(site, { code: 'CONFLICT', message: expect.stringContaining('preseed') })
    await rm(join(site.directory, 'preseed'), { recursive: true })
    await run('qemu-img', ['create', '-q', '-f', 'qcow2', path, String(2 * MIB)])
    await run('qemu-io', ['-f', 'qcow2', '-c', 'write -P 7 65536 65536', path])
    await site.attach()
    expect(await mirrorHasData(site.directory, site.disks)).toBe(true)
    expect(await hashesOf(site, 0, 0)).toEqual(expectedHashes(Buffer.alloc(4 * MIB).fill(7, 65_536, 131_072)))
  })

  test('another device under the name of the mirror is not touched', async () => {
    await using site = await MirrorSite.make(vmDirectory(), 'device', random)
    await site.attach()
    const path = join(site.directory, 'mirror/0.json')
    const record = JSON.parse(await readFile(path, 'utf8')) as object
    await site.store[Symbol.asyncDispose]()
    await writeFile(path, JSON.stringify({ ...record, identity: 'wwid of another one' }))
    await site.open()
    await expect(site.attach()).rejects.toMatchObject({ code: 'CONFLICT', message: expect.stringContaining('not the device') })
    expect(site.store.condition).toBe('open')
  })
})
