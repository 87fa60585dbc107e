// Two daemons with an answer for everything, behind real sockets: what the tests of pvecdp talk to.
import { mkdtemp, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { agentApi, createApi, EventLog, implement, pluginApi } from '../../core/api/index.ts'
import type { AgentStatus, PluginStatus, RecoveryPoint, Retention, Scrub, VpgStatus } from '../../core/api/index.ts'
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

export const retention: Retention = {
  vpg: 'web',
  siteId: 'site-p',
  policy: { historyMs: 86_400_000, thinning: [], journalLimitBytes: 32 * 2 ** 30, warnBytes: 24 * 2 ** 30, hardStopBytes: 48 * 2 ** 30, promotionBytesPerSec: 2 ** 27, syncOverflow: 'grow' },
  from: { id: '2', atUnixMs: nowUnixMs - 36_000_000 },
  to: { id: '41', atUnixMs: nowUnixMs - 3200 },
  checkpoints: 7200,
  lengthMs: 36_000_000,
  limitedBy: 'pin',
  pins: [{ vmId: 101, reason: 'recovery point p-1', sinceUnixMs: nowUnixMs - 60_000, atSeq: 812 }],
  vms: [{ vmId: 101, journalBytes: 33 * 2 ** 30, baseSeq: 800, durableSeq: 90_000, condition: 'open' }],
  promotion: { vmId: 101, checkpointId: '3', toUnixMs: nowUnixMs - 35_000_000, doneBytes: 2 ** 20, totalBytes: 2 ** 21 },
  space: { freeBytes: 2 ** 36, totalBytes: 2 ** 40, reserveBytes: 30_000_000_000 },
  alarms: [{ id: 'retention.over-limit', level: 'error', message: 'the journal of VM 101 is above its limit; a pin holds it', vmId: 101, sinceUnixMs: nowUnixMs - 50_000 }],
}

export const scrub: Scrub = {
  everyMs: 604_800_000,
  rateBytesPerSec: 16 * 2 ** 20,
  vms: [
    {
      vmId: 101, siteId: 'site-p', isHopeless: false,
      running: { startedAtUnixMs: nowUnixMs - 60_000, readBytes: 2 ** 30, totalBytes: 5 * 2 ** 30 },
      last: { startedAtUnixMs: nowUnixMs - 700_000_000, endedAtUnixMs: nowUnixMs - 600_000_000, readBytes: 2 ** 32, damagedFound: 0 },
      damage: [{ what: 'records 12 to 14: frame body does not match its checksum', foundAtUnixMs: nowUnixMs - 50_000, healed: true }, { what: 'scsi0 at 65536 (65536 bytes of the mirror): \x1b[2J', foundAtUnixMs: nowUnixMs - 40_000, healed: false }],
      checkpoints: { vpg: 'web', count: 3, oldest: { id: '7', atUnixMs: nowUnixMs - 90_000 }, newest: { id: '9', atUnixMs: nowUnixMs - 80_000 } },
    },
    { vmId: 102, siteId: 'site-p', isHopeless: true, damage: [] },
  ],
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
      forceSync: async (request) => {
        known(request.params.name)
        note('forceSync', request)
        return { vmIds: request.body.vmId === undefined ? [101, 102] : [request.body.vmId] }
      },
      verify: async (request) => {
        known(request.params.name)
        note('verify', request)
        return { vmIds: request.body.vmId === undefined ? [101, 102] : [request.body.vmId] }
      },
      tagCheckpoint: async (request) => {
        known(request.params.name)
        note('tagCheckpoint', request)
        return { checkpointId: '42', atUnixMs: nowUnixMs, state: 'pending' as const }
      },
      suspendVm: async (request) => {
        note('suspendVm', request)
        if (request.params.vmId !== '101') throw new CdpError('CONFLICT', 'a backup runs on it', { hint: 'Wait until that operation has ended.' })
        const { owner, reason, forMs } = request.body
        return { vmId: 101, state: 'suspended', reason: `held by ${owner}: ${reason}`, holds: [{ owner, reason, sinceUnixMs: nowUnixMs, untilUnixMs: nowUnixMs + forMs }] }
      },
      resumeVm: async (request) => {
        note('resumeVm', request)
        return { vmId: 101, state: 'attaching', reason: 'suspended, held by qm: resize', holds: [], held: request.body.owner === 'qm' }
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
      showRetention: async (request) => {
        known(request.params.name)
        return retention
      },
      setRetention: async (request) => {
        known(request.params.name)
        note('setRetention', request)
        return { ...retention, policy: { ...retention.policy, syncOverflow: request.body.syncOverflow } }
      },
      listReplicas: async () => ({ replicas: [{ siteId: 'site-p', vmId: 103, state: 'left' as const, journalBytes: 2 ** 30, mirrorBytes: 2 ** 33, checkpoints: 4, readers: ['recovery point p-1'] }] }),
      deleteReplica: async (request) => {
        note('deleteReplica', request)
        if (request.body.confirm !== String(request.body.vmId)) throw new CdpError('BAD_INPUT', 'not the VM that is to be deleted', { hint: 'Confirm with its id.' })
        return { siteId: 'site-p', checkpoints: request.body.withCheckpoints === true ? 4 : 0 }
      },
      showScrub: async () => scrub,
      startScrub: async (request) => {
        note('startScrub', request)
        if (request.body.vmId === 999) throw new CdpError('NOT_FOUND', 'there is no replica of VM 999 here')
        return { vmIds: request.body.vmId === undefined ? [101, 102] : [request.body.vmId] }
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
