import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterAll, afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { silentLogger } from '../../core/log/index.ts'
import { MirrorStorage } from '../mirror/index.ts'
import { SegmentSealer, VmStore } from './index.ts'
import { checkPreseeds, takePreseeds } from './preseed.ts'

const disks = [{ disk: 0, key: 'scsi0', sizeBytes: 8192 }, { disk: 1, key: 'scsi1', sizeBytes: 8192 }]
const sealer = new SegmentSealer()
afterAll(() => sealer[Symbol.asyncDispose]())
let directory = ''
beforeEach(async () => {
  directory = await mkdtemp('/tmp/cdp-p-')
})
afterEach(() => rm(directory, { recursive: true, force: true }))
const place = async (name: string, bytes: Buffer): Promise<void> => {
  await mkdir(join(directory, name, '..'), { recursive: true })
  await writeFile(join(directory, name), bytes)
}
const openStore = (): Promise<VmStore> => VmStore.open({ directory, vm: '101', log: silentLogger, clock: { nowUnixMs: Date.now }, sealer })

describe('a preseed', () => {
  test('becomes the mirror with the first attach, and only of its own disk; another attach changes nothing', async () => {
    await place('preseed/scsi1.raw', Buffer.alloc(4096, 7))
    await using store = await openStore()
    expect(await store.beginEpoch(disks)).toMatchObject({ baseComplete: false })
    expect((await readFile(join(directory, 'mirror/1.raw'))).equals(Buffer.concat([Buffer.alloc(4096, 7), Buffer.alloc(4096)]))).toBe(true)
    expect((await readFile(join(directory, 'mirror/0.raw'))).equals(Buffer.alloc(8192))).toBe(true)
    // It comes too late now: what is there may have been written to.
    await place('preseed/scsi1.raw', Buffer.alloc(4096, 9))
    await store.beginEpoch(disks)
    expect((await readFile(join(directory, 'mirror/1.raw')))[0]).toBe(7)
    expect((await readFile(join(directory, 'preseed/scsi1.raw')))[0]).toBe(9)
  })

  test('is refused before anything changes if it cannot be of that disk; taken away, the attach works', async () => {
    await place('preseed/scsi0.raw', Buffer.alloc(8192 + 512))
    await using store = await openStore()
    await expect(store.beginEpoch(disks)).rejects.toMatchObject({ code: 'CONFLICT' })
    expect([store.condition, store.epoch]).toEqual(['open', 0])
    await rm(join(directory, 'preseed/scsi0.raw'))
    await symlink('/etc/hostname', join(directory, 'preseed/scsi0.raw'))
    await expect(checkPreseeds(directory, new MirrorStorage({ vmDirectory: directory }), disks)).rejects.toMatchObject({ code: 'CONFLICT' })
    await rm(join(directory, 'preseed/scsi0.raw'))
    expect(await store.beginEpoch(disks)).toMatchObject({ epoch: 1 })
  })

  test('of which a crash left some taken is taken on with the next attach', async () => {
    await place('mirror/0.raw', Buffer.alloc(8192, 1))
    await place('preseed/scsi1.raw', Buffer.alloc(8192, 2))
    expect(await takePreseeds(directory, new MirrorStorage({ vmDirectory: directory }), disks)).toEqual({ taken: ['scsi1'], late: [] })
    expect(await takePreseeds(directory, new MirrorStorage({ vmDirectory: directory }), disks)).toEqual({ taken: [], late: [] })
    expect((await readFile(join(directory, 'mirror/1.raw')))[0]).toBe(2)
  })
})
