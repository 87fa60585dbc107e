import { mkdir, mkdtemp, readFile, rm, stat, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { silentLogger } from '../../core/log/index.ts'
import type { CheckpointMark } from '../../core/record/index.ts'
import { Cluster } from './cluster.ts'
import { ClusterFiles, localNodeName } from './cluster-files.ts'
import { NodeMessageParser, checkAnswer, encodeMessage, readReply, readRequest } from './wire.ts'
import type { NodeHandlers } from './wire.ts'

const mark: CheckpointMark = { id: 'x1', vpg: 'shop', vms: ['101', '102'], atUnixMs: 1, kind: 'automatic' }
let dir = ''
beforeEach(async () => void (dir = await mkdtemp('/tmp/cdp-')))
afterEach(() => rm(dir, { recursive: true, force: true }))

describe('messages between nodes', () => {
  const requests = [{ id: 1, name: 'hold', ask: { vpg: 'shop', cutId: 'c', holdMs: 20 } }, { id: 2, name: 'status', ask: {} }, { id: 3, name: 'commit', ask: { vpg: 'shop', cutId: 'c', mark } }]

  test('come out as they went in, however they are cut', () => {
    const bytes = Buffer.concat(requests.map(encodeMessage))
    for (const size of [1, 3, 7, 64, bytes.length]) {
      const seen: unknown[] = []
      const parser = new NodeMessageParser((message) => seen.push(readRequest(message)))
      for (let at = 0; at < bytes.length; at += size) parser.push(bytes.subarray(at, at + size))
      expect(seen).toEqual(requests)
    }
  })

  test.each([['too long', Buffer.from([1, 0, 0, 1])], ['empty', Buffer.from([0, 0, 0, 0])], ['no JSON', Buffer.from([1, 0, 0, 0, 0x7b])], ['no object', Buffer.from([1, 0, 0, 0, 0x31])]])('that are %s end the conversation', (_what, bytes) => {
    expect(() => new NodeMessageParser(() => undefined).push(bytes)).toThrow(expect.objectContaining({ code: 'STREAM_PROTOCOL' }))
  })

  test.each([{ id: 7, name: 'hold', ask: { vpg: 'shop', cutId: 'c', holdMs: 1e9 } }, { id: 7, name: 'toString', ask: {} }, { id: 7, name: 'commit', ask: { vpg: 'shop', cutId: 'c' } }])('%j is refused, and the one who asked is told', (message) => {
    expect(() => readRequest(message)).toThrow(expect.objectContaining({ code: 'BAD_INPUT', context: { id: 7 } }))
  })

  test('strange answers are errors', () => {
    expect(() => readReply({ id: 'x' })).toThrow(expect.objectContaining({ code: 'STREAM_PROTOCOL' }))
    expect(() => checkAnswer('hold', { held: ['101'] })).toThrow(expect.objectContaining({ code: 'STREAM_PROTOCOL' }))
    expect(checkAnswer('hold', { refused: 'syncing' })).toEqual({ refused: 'syncing' })
  })
})

/** One cluster file system, as node `name` sees it. */
const node = async (name: string): Promise<string> => {
  const pve = join(dir, name)
  await mkdir(join(dir, 'cluster/nodes', name, 'qemu-server'), { recursive: true })
  await mkdir(join(dir, 'cluster/priv/lock'), { recursive: true })
  await mkdir(pve, { recursive: true })
  for (const shared of ['nodes', 'priv', '.vmlist', '.members']) await symlink(join(dir, 'cluster', shared), join(pve, shared))
  await symlink(`nodes/${name}`, join(pve, 'local'))
  await symlink(`nodes/${name}/qemu-server`, join(pve, 'qemu-server'))
  return pve
}
const filesOf = (pveDirectory: string, nodeName: string): ClusterFiles => new ClusterFiles({ pveDirectory, siteDirectory: join(dir, 'cluster/priv/cdp'), nodeName })

describe('the cluster file system', () => {
  test('names this node, the others, and the node of each VM; a configuration that lies here wins over the list', async () => {
    const files = filesOf(await node('pve1'), 'pve1')
    await node('pve2')
    expect(await localNodeName(join(dir, 'pve1'))).toBe('pve1')
    expect(await files.nodes()).toEqual(['pve1', 'pve2'])
    expect(await files.placement([101])).toEqual(new Map())
    await writeFile(join(dir, 'cluster/.vmlist'), JSON.stringify({ version: 1, ids: { 101: { node: 'pve2', type: 'qemu' }, 102: { node: 'pve2', type: 'qemu' }, 103: { node: 'pve2', type: 'lxc' }, 104: { node: 'pve1', type: 'qemu' } } }))
    await writeFile(join(dir, 'pve1/qemu-server/101.conf'), '')
    // 104 has just left: listed here still, without its configuration.
    expect(await files.placement([101, 102, 103, 104, 105])).toEqual(new Map([[101, 'pve1'], [102, 'pve2']]))
  })

  test('gives the addresses that nodes publish, and Proxmox knows', async () => {
    const files = filesOf(await node('pve1'), 'pve1')
    expect(await files.addressOf('pve1')).toBeUndefined()
    await files.publishAddress({ host: '10.0.0.1', port: 8766 })
    expect(await files.addressOf('pve1')).toEqual({ host: '10.0.0.1', port: 8766 })
    expect(await files.memberAddress('pve1')).toBeUndefined()
    await writeFile(join(dir, 'cluster/.members'), JSON.stringify({ nodename: 'pve1', nodelist: { pve1: { id: 1, online: 1, ip: '10.0.0.1' } } }))
    expect(await files.memberAddress('pve1')).toBe('10.0.0.1')
  })

  test('is changed by one node at a time, and free again after a failure', async () => {
    const [one, two] = [filesOf(await node('pve1'), 'pve1'), filesOf(await node('pve2'), 'pve2')]
    const order: string[] = []
    const { promise: inside, resolve: entered } = Promise.withResolvers<void>()
    const { promise: go, resolve: leave } = Promise.withResolvers<void>()
    const first = one.locked(async () => {
      entered()
      await go
      order.push('one')
    })
    await inside
    const second = two.locked(async () => void order.push('two'))
    leave()
    await Promise.all([first, second])
    expect(order).toEqual(['one', 'two'])
    await expect(one.locked(() => Promise.reject(new Error('no')))).rejects.toThrow('no')
    await expect(stat(join(dir, 'cluster/priv/lock/cdp'))).rejects.toMatchObject({ code: 'ENOENT' })
  })
})

const silentNode: NodeHandlers = {
  hold: async () => ({ refused: 'nothing here' }), commit: async () => ({ refused: 'nothing here' }), release: async () => ({}), status: async () => ({ vpgs: [] }), tag: async () => ({ id: 'x', atUnixMs: 1 }),
}
const open = async (name: string, handlers: NodeHandlers): Promise<Cluster> => {
  const cluster = await Cluster.open({ pveDirectory: await node(name), siteDirectory: join(dir, 'cluster/priv/cdp'), link: { host: '127.0.0.1', port: 0 }, log: silentLogger })
  cluster.serve(handlers)
  return cluster
}
const untilKnown = async (cluster: Cluster, other: string): Promise<void> => {
  while (!cluster.report(other).known) await new Promise((resolve) => setTimeout(resolve, 10))
}

describe('nodes of a cluster', () => {
  test('are one site; each asks the other over a connection that stays open', async () => {
    const asked: unknown[] = []
    await using one = await open('pve1', silentNode)
    await using two = await open('pve2', {
      ...silentNode,
      hold: async (ask, from) => {
        asked.push([from, ask])
        return { held: [102] }
      },
      commit: async (ask) => ({ committed: ask.mark.vms.map(Number) }),
      tag: async () => Promise.reject(new Error('not today')),
      status: async () => ({ vpgs: [{ name: 'shop', vms: [], abandonedCuts: 3 }] }),
    })
    expect(one.siteId).toBe(two.siteId)
    expect((await stat(join(dir, 'cluster/priv/cdp/site-id'))).mode & 0o777).toBe(0o600)
    expect(one.report('pve2')).toEqual({ known: false, why: 'node pve2 is not connected yet' })
    for (const [cluster, other] of [[two, 'pve1'], [one, 'pve2']] as const) await cluster.tend(new Set([other]))
    await untilKnown(one, 'pve2')
    expect(one.report('pve2')).toMatchObject({ known: true, vpgs: new Map([['shop', { name: 'shop', vms: [], abandonedCuts: 3 }]]) })
    const participant = one.participant('pve2')
    expect(await participant.hold('shop', 'c1', 20)).toEqual({ held: [102] })
    expect(asked).toEqual([['pve1', { vpg: 'shop', cutId: 'c1', holdMs: 20 }]])
    expect(await participant.commit('shop', 'c1', mark)).toEqual({ committed: [101, 102] })
    await expect(one.tag('pve2', 'shop', 'now')).rejects.toMatchObject({ message: 'not today' })
    // Nobody needs it any more.
    await one.tend(new Set())
    await expect(participant.hold('shop', 'c2', 20)).rejects.toMatchObject({ code: 'UNREACHABLE' })
  })

  test('an answer that does not come costs the deadline and nothing else', async () => {
    await using one = await open('pve1', silentNode)
    await using two = await open('pve2', { ...silentNode, hold: () => new Promise(() => undefined) })
    for (const [cluster, other] of [[two, 'pve1'], [one, 'pve2']] as const) await cluster.tend(new Set([other]))
    await untilKnown(one, 'pve2')
    await expect(one.participant('pve2').hold('shop', 'c1', 20)).rejects.toMatchObject({ code: 'TIMEOUT' })
    expect(await one.participant('pve2').release('shop', 'c1')).toEqual({})
  })

  test('a node that answers at the address of another is not taken for it', async () => {
    await using one = await open('pve1', silentNode)
    await using two = await open('pve2', silentNode)
    await node('pve3')
    await two.tend(new Set())
    await writeFile(join(dir, 'cluster/priv/cdp/nodes/pve3.json'), await readFile(join(dir, 'cluster/priv/cdp/nodes/pve2.json')), { mode: 0o600 })
    await one.tend(new Set(['pve3']))
    let why = ''
    while (!why.includes('another node')) {
      await new Promise((resolve) => setTimeout(resolve, 10))
      const report = one.report('pve3')
      why = report.known ? '' : report.why
    }
    expect(why).toMatch(/^node pve3 cannot be reached: another node answers at 127\.0\.0\.1/)
  })

  test('one that is alone opens no port and makes no authority', async () => {
    await using one = await open('pve1', silentNode)
    await one.tend(new Set())
    await expect(stat(join(dir, 'cluster/priv/cdp/authority.pem'))).rejects.toMatchObject({ code: 'ENOENT' })
    await expect(stat(join(dir, 'cluster/priv/cdp/nodes'))).rejects.toMatchObject({ code: 'ENOENT' })
  })
})
