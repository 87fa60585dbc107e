import { mkdir, mkdtemp, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { EventLog } from '../../core/api/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { Cluster } from '../cluster/index.ts'
import { PluginService } from './index.ts'
import { VpgBook } from './vpg-book.ts'

let dir = ''
beforeEach(async () => void (dir = await mkdtemp('/tmp/cdp-')))
afterEach(() => rm(dir, { recursive: true, force: true }))
const shop = { name: 'shop', vmIds: [101, 102], checkpointEveryMs: 5000 }

describe('PluginService without a pairing', () => {
  test('runs although groups are defined, says that they are not protected, and keeps them in the book', async () => {
    const pveDirectory = join(dir, 'pve')
    const siteDirectory = join(dir, 'pve/cdp')
    await mkdir(siteDirectory, { recursive: true })
    await using cluster = await Cluster.open({ pveDirectory, siteDirectory, nodeName: 'pve1', link: { host: '127.0.0.1', port: 0 }, log: silentLogger })
    const book = new VpgBook(join(dir, 'vpgs.json'))
    await book.write([shop])
    const settings = {
      paths: { qemuServerDirectory: dir, pveDirectory }, stateDirectory: dir, runDirectory: dir, memoryBytesPerVm: 1 << 24, lingerMs: 5, syncRateBytesPerSec: 0, proofEveryMs: 1000, rotateEveryMs: 60_000,
      slowAck: { p99Ms: 100, maxMs: 1000 }, verify: { everyMs: 0, rateBytesPerSec: 0 }, existingNbdServers: {},
    }
    const service = new PluginService({ cluster, settings, siteDirectory, vpgFile: join(dir, 'vpgs.json'), holdMs: 20, log: silentLogger, events: new EventLog() })
    await service.start()
    expect(service.vpgs).toEqual([])
    await expect(service.createVpg({ ...shop, vmIds: [103] })).rejects.toMatchObject({ code: 'CONFLICT' })
    await expect(service.createVpg({ name: 'mail', vmIds: [103], checkpointEveryMs: 5000 })).rejects.toMatchObject({ code: 'NOT_PAIRED', hint: expect.stringContaining('pair') })
    await expect(service.createVpg({ name: 'mail', vmIds: [103], checkpointEveryMs: 7000 })).rejects.toMatchObject({ code: 'BAD_INPUT' })
    expect(await book.read()).toEqual([shop])
    await expect(service.deleteVpg('mail')).rejects.toMatchObject({ code: 'NOT_FOUND' })
    await service.deleteVpg('shop')
    expect(await book.read()).toEqual([])
    await service[Symbol.asyncDispose]()
    await service[Symbol.asyncDispose]()
  })
})
