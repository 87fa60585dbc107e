// Two daemons with an answer for everything, behind real sockets: what the tests of pvecdp talk to.
import { mkdtemp, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { agentApi, createApi, EventLog, implement, pluginApi } from '../../core/api/index.ts'
import type { AgentStatus, PluginStatus, RecoveryPoint, VpgStatus } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { formatToken } from '../../core/pairing/index.ts'

export const nowUnixMs = Date.UTC(2026, 10, 23, 7, 0, 0)
export const secretToken = formatToken({ host: 'dr', port: 7402, caFingerprintSha256: 'ab'.repeat(32), secret: 'S'.repeat(43) })

export const vpg: VpgStatus = {
  name: 'web',
  state: 'degraded',
  reason: 'VM 102 is behind: link down since 06:58',
  rpoMs: 3200,
  lastCheckpoint: { id: '41', atUnixMs: nowUnixMs - 3200 },
  checkpointEveryMs: 5000,
  abandonedCuts: 2,
  vms: [
    {
      vmId: 101,
      state: 'streaming',
      reason: 'all writes are captured',
      sinceUnixMs: nowUnixMs - 60_000,
      receivedSeq: 120,
      durableSeq: 118,
      bufferedBytes: 4096,
      disks: [{ key: 'scsi0', sizeBytes: 2 ** 35 }],
      ackLatencyUs: { p50: 42, p99: 180, max: 2100 },
    },
    {
      vmId: 102,
      state: 'syncing',
      reason: 'initial sync',
      sinceUnixMs: nowUnixMs - 9000,
      sync: { kind: 'initial', doneBytes: 2 ** 34, totalBytes: 2 ** 35, rateBytesPerSec: 2 ** 27, secondsLeft: 128 },
      receivedSeq: 7,
      durableSeq: 7,
      bufferedBytes: 0,
      disks: [
        { key: 'scsi0', sizeBytes: 2 ** 35 },
        { key: 'virtio1', sizeBytes: 2 ** 30 },
      ],
      ackLatencyUs: { p50: 0, p99: 0, max: 0 },
    },
  ],
}
const empty: VpgStatus = { name: 'db', state: 'initializing', reason: 'attaching', rpoMs: null, checkpointEveryMs: 5000, abandonedCuts: 0, vms: [] }

export const pluginStatus: PluginStatus = {
  side: 'plugin',
  siteId: 'site-p',
  version: '0.1.0',
  peer: { state: 'connected', address: 'dr.example port 7402' },
  vpgs: [vpg, empty],
}
export const agentStatus: AgentStatus = {
  side: 'agent',
  siteId: 'site-a',
  version: '0.1.0',
  sites: [{ siteId: 'site-p', connected: true, address: '192.0.2.7' }],
  vpgs: [
    {
      name: 'web',
      siteId: 'site-p',
      rpoMs: null,
      lastValidCheckpoint: { id: '41', atUnixMs: nowUnixMs - 3200 },
      checkpoints: 812,
      oldestAtUnixMs: nowUnixMs - 7_200_000,
      vms: [
        { vmId: 101, epoch: 3, durableSeq: 118, journalBytes: 5 * 2 ** 30, baseComplete: true, connected: true },
        { vmId: 102, epoch: 1, durableSeq: 7, journalBytes: 0, baseComplete: false, connected: false },
      ],
    },
  ],
}
export const point: RecoveryPoint = {
  pointId: 'p-1',
  vpg: 'web',
  checkpointId: '41',
  atUnixMs: nowUnixMs - 3200,
  disks: [{ vmId: 101, key: 'scsi0', sizeBytes: 2 ** 35, uri: 'nbd+unix:///p-1-101-scsi0?socket=/run/pve-cdp/points.sock' }],
}

export type FakeDaemons = {
  pluginSocket: string
  agentSocket: string
  requests: { operation: string; request: unknown }[]
  pluginEvents: EventLog
  agentEvents: EventLog
  stopAgent: () => Promise<void>
  stopPlugin: () => Promise<void>
  [Symbol.asyncDispose]: () => Promise<void>
}

export const startFakeDaemons = async (): Promise<FakeDaemons> => {
  const root = await mkdtemp('/tmp/cdp-cli-')
  const requests: FakeDaemons['requests'] = []
  const note = (operation: string, request: object): void => {
    requests.push({ operation, request: Object.fromEntries(Object.entries(request).filter(([key]) => key !== 'signal')) })
  }
  const known = (name: string): void => {
    if (name !== 'web') throw new CdpError('NOT_FOUND', `there is no VPG ${name}`, { hint: 'See what there is with: pvecdp status', context: { vpg: name } })
  }
  const pluginEvents = new EventLog({ nowUnixMs: () => nowUnixMs })
  const agentEvents = new EventLog({ nowUnixMs: () => nowUnixMs + 1 })
  const plugin = await createApi({
    socketPath: join(root, 'p.sock'),
    log: silentLogger,
    events: pluginEvents,
    routes: implement(pluginApi, {
      status: async () => pluginStatus,
      listVpgs: async () => ({ vpgs: pluginStatus.vpgs }),
      pair: async (request) => {
        note('pair', request)
        if (request.body.token !== secretToken)
          throw new CdpError('PAIRING', 'the agent refused the pairing: this token was used already', {
            hint: 'Make a new one at the recovery site: pvecdp pair token',
          })
        return { siteId: 'site-p', agentSiteId: 'site-a', address: 'dr port 7402' }
      },
      createVpg: async (request) => {
        note('createVpg', request)
        if (request.body.name === 'web') throw new CdpError('CONFLICT', 'there is a VPG web already', { hint: 'Choose another name.', context: { vpg: 'web' } })
        return { ...empty, name: request.body.name }
      },
      deleteVpg: async (request) => {
        known(request.params.name)
        note('deleteVpg', request)
        return {}
      },
      tagCheckpoint: async (request) => {
        known(request.params.name)
        note('tagCheckpoint', request)
        return { checkpointId: '42', atUnixMs: nowUnixMs, state: 'pending' as const }
      },
    }),
  })
  const agent = await createApi({
    socketPath: join(root, 'a.sock'),
    log: silentLogger,
    events: agentEvents,
    routes: implement(agentApi, {
      status: async () => agentStatus,
      createPairingToken: async (request) => {
        note('createPairingToken', request)
        return { token: secretToken, expiresAtUnixMs: nowUnixMs + 900_000 }
      },
      listCheckpoints: async (request) => {
        known(request.params.name)
        note('listCheckpoints', request)
        return {
          checkpoints: [
            { id: '41', atUnixMs: nowUnixMs - 3200, kind: 'tagged' as const, tag: 'before \x1b[2J upgrade', state: 'proved' as const },
            { id: '40', atUnixMs: nowUnixMs - 8200, kind: 'automatic' as const, state: 'suspect' as const },
          ],
        }
      },
      openPoint: async (request) => {
        known(request.body.vpg)
        note('openPoint', request)
        return point
      },
      listPoints: async () => ({ points: [point] }),
      closePoint: async (request) => {
        note('closePoint', request)
        if (request.params.id !== 'p-1') throw new CdpError('NOT_FOUND', `there is no recovery point ${request.params.id}`, { hint: 'See: pvecdp point list' })
        return {}
      },
    }),
  })
  return {
    pluginSocket: plugin.socketPath,
    agentSocket: agent.socketPath,
    requests,
    pluginEvents,
    agentEvents,
    stopAgent: () => agent[Symbol.asyncDispose](),
    stopPlugin: () => plugin[Symbol.asyncDispose](),
    [Symbol.asyncDispose]: async () => {
      await plugin[Symbol.asyncDispose]()
      await agent[Symbol.asyncDispose]()
      await rm(root, { recursive: true, force: true })
    },
  }
}
