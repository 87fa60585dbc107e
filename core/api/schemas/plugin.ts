import { Type } from '@sinclair/typebox'
import type { Static } from '@sinclair/typebox'
import type { Endpoints } from '../endpoint.ts'
import { Bytes, CheckpointId, CheckpointState, Count, NoContent, Request, RpoMs, Seq, UnixMs, VmId, VpgName } from './common.ts'

export const VmStatus = Type.Object({
  vmId: VmId,
  /** The node of the cluster it is on; absent if it is on none. */
  node: Type.Optional(Type.String()),
  /** unknown: it is on another node, and that one does not say. */
  state: Type.Union([Type.Literal('unknown'), Type.Literal('detached'), Type.Literal('attaching'), Type.Literal('syncing'), Type.Literal('streaming'), Type.Literal('tracking')]),
  /** Why it is in this state, a sentence for people; never empty. */
  reason: Type.String(),
  sinceUnixMs: UnixMs,
  sync: Type.Optional(
    Type.Object({
      kind: Type.String(),
      doneBytes: Bytes,
      totalBytes: Bytes,
      rateBytesPerSec: Type.Number({ minimum: 0 }),
      secondsLeft: Type.Union([Type.Number({ minimum: 0 }), Type.Null()]),
    }),
  ),
  receivedSeq: Seq,
  durableSeq: Seq,
  bufferedBytes: Bytes,
  disks: Type.Array(Type.Object({ key: Type.String(), sizeBytes: Bytes })),
  /** What capture adds to a guest's write, in microseconds, over the last second. `held`: the longest wait for a group cut over several nodes; `max` includes it, the others do not. */
  ackLatencyUs: Type.Object({ p50: Type.Number({ minimum: 0 }), p99: Type.Number({ minimum: 0 }), max: Type.Number({ minimum: 0 }), held: Type.Optional(Type.Number({ minimum: 0 })) }),
})
export type VmStatus = Static<typeof VmStatus>

export const VpgStatus = Type.Object({
  name: VpgName,
  state: Type.Union([Type.Literal('initializing'), Type.Literal('protected'), Type.Literal('degraded'), Type.Literal('stopped')]),
  reason: Type.String(),
  rpoMs: RpoMs,
  lastCheckpoint: Type.Optional(Type.Object({ id: CheckpointId, atUnixMs: UnixMs })),
  checkpointEveryMs: Type.Integer({ minimum: 1 }),
  /** Cuts given up because the hold ran out or a node did not take part; no harm as long as the RPO holds. */
  abandonedCuts: Count,
  vms: Type.Array(VmStatus),
})
export type VpgStatus = Static<typeof VpgStatus>

export const PeerStatus = Type.Object({
  state: Type.Union([Type.Literal('unpaired'), Type.Literal('connected'), Type.Literal('disconnected')]),
  address: Type.Optional(Type.String()),
  reason: Type.Optional(Type.String()),
})

export const PluginStatus = Type.Object({
  side: Type.Literal('plugin'),
  siteId: Type.String(),
  /** The node of the cluster that says this. */
  node: Type.Optional(Type.String()),
  version: Type.String(),
  peer: PeerStatus,
  vpgs: Type.Array(VpgStatus),
})
export type PluginStatus = Static<typeof PluginStatus>

export const CreateVpg = Request({
  name: VpgName,
  vmIds: Type.Array(VmId, { minItems: 1, maxItems: 1000, uniqueItems: true, description: 'expected a list of one to 1000 different VM ids' }),
  checkpointEveryMs: Type.Integer({ minimum: 1000, maximum: 3_600_000, default: 5000, description: 'expected 1000 to 3600000 ms' }),
})

/** What the plugin's API offers, beside GET /v1/events. */
export const pluginApi = {
  status: { method: 'GET', path: '/v1/status', answer: PluginStatus },
  pair: {
    method: 'POST',
    path: '/v1/pair',
    body: Request({ token: Type.String({ minLength: 1, maxLength: 2048 }) }),
    answer: Type.Object({ siteId: Type.String(), agentSiteId: Type.String(), address: Type.String() }),
  },
  listVpgs: { method: 'GET', path: '/v1/vpgs', answer: Type.Object({ vpgs: Type.Array(VpgStatus) }) },
  createVpg: { method: 'POST', path: '/v1/vpgs', body: CreateVpg, answer: VpgStatus },
  deleteVpg: { method: 'DELETE', path: '/v1/vpgs/:name', params: Request({ name: VpgName }), answer: NoContent },
  tagCheckpoint: {
    method: 'POST',
    path: '/v1/vpgs/:name/checkpoints',
    params: Request({ name: VpgName }),
    body: Request({ tag: Type.String({ minLength: 1, maxLength: 200, description: 'expected a text of 1 to 200 characters' }) }),
    answer: Type.Object({ checkpointId: CheckpointId, atUnixMs: UnixMs, state: CheckpointState }),
  },
} as const satisfies Endpoints
