import { afterEach, expect, jest, test } from '@jest/globals'
import { silentLogger } from '../../core/log/index.ts'
import { Vpg, noPeers } from './index.ts'
import type { NodeNews, VpgEvent, VpgPeers } from './index.ts'

afterEach(() => void jest.restoreAllMocks())

const groupWith = (news: (node: string) => NodeNews): { vpg: Vpg; events: VpgEvent[] } => {
  const events: VpgEvent[] = []
  const peers: VpgPeers = { ...noPeers, nodeName: 'pve1', news }
  const settings = {
    paths: { qemuServerDirectory: '/nowhere', pveDirectory: '/nowhere' }, stateDirectory: '/nowhere', runDirectory: '/nowhere', memoryBytesPerVm: 1 << 24, lingerMs: 5, syncRateBytesPerSec: 0, verify: { everyMs: 0, rateBytesPerSec: 0 },
    proofEveryMs: 1000, rotateEveryMs: 1000, slowAck: { p99Ms: 1, maxMs: 1 }, existingNbdServers: {},
  }
  const agent = { host: '127.0.0.1', port: 1, tls: { certificatePem: '', privateKeyPem: '', authorityPem: '' } }
  const vpg = new Vpg({ definition: { name: 'shop', vmIds: [101, 102], checkpointEveryMs: 5000 }, settings, agent, peers, log: silentLogger, onEvent: (event) => events.push(event) })
  return { vpg, events }
}

test.each<[string, ReadonlyMap<number, string>, NodeNews, string]>([
  ['is on no node any more', new Map([[101, 'pve1']]), { known: false, why: '' }, 'VM 102 of shop is not protected: it is on no node of this cluster any more'],
  ['is on a node without a plugin', new Map([[101, 'pve1'], [102, 'pve2']]), { known: false, why: 'it has never answered' }, 'VM 102 of shop is not protected: it is on node pve2, and the plugin there does not say that it protects it: it has never answered'],
  ['is on a node that does not know the group', new Map([[101, 'pve1'], [102, 'pve2']]), { known: true, report: undefined }, 'VM 102 of shop is not protected: it is on node pve2, and the plugin there does not know the group'],
])('a member that %s is told of as an error within 10 s', (_what, nodeOf, news, message) => {
  let nowMs = 0
  jest.spyOn(performance, 'now').mockImplementation(() => nowMs)
  const { vpg, events } = groupWith(() => news)
  for (; nowMs < 10_000; nowMs += 1000) vpg.place(nodeOf)
  expect(events.filter(({ level }) => level === 'error')).toEqual([{ level: 'error', kind: 'member-unprotected', message, context: { vpg: 'shop', vmId: 102 } }])
  vpg.place(new Map([[101, 'pve1'], [102, 'pve1']]))
  expect(events.at(-1)).toMatchObject({ level: 'info', kind: 'member-back' })
})
