import { Type } from '@sinclair/typebox'
import type { Static } from '@sinclair/typebox'
import type { Endpoints } from '../endpoint.ts'
import { Bytes, CheckpointId, CheckpointState, Count, NoContent, Request, RpoMs, Seq, UnixMs, VmId, VpgName } from './common.ts'

export const AgentSite = Type.Object({
  siteId: Type.String(),
  connected: Type.Boolean(),
  address: Type.Optional(Type.String()),
  pairedAtUnixMs: Type.Optional(UnixMs),
  certificateEndsAtUnixMs: Type.Optional(UnixMs),
})

export const AgentVm = Type.Object({
  vmId: VmId,
  epoch: Type.Integer({ minimum: 0 }),
  durableSeq: Seq,
  journalBytes: Bytes,
  /** False until the initial sync ended: nothing can be recovered yet. */
  baseComplete: Type.Boolean(),
  connected: Type.Boolean(),
})

export const AgentVpg = Type.Object({
  name: VpgName,
  siteId: Type.String(),
  rpoMs: RpoMs,
  lastValidCheckpoint: Type.Optional(Type.Object({ id: CheckpointId, atUnixMs: UnixMs })),
  checkpoints: Count,
  oldestAtUnixMs: Type.Optional(UnixMs),
  vms: Type.Array(AgentVm),
})
export type AgentVpg = Static<typeof AgentVpg>

export const AgentStatus = Type.Object({
  side: Type.Literal('agent'),
  siteId: Type.String(),
  version: Type.String(),
  sites: Type.Array(AgentSite),
  vpgs: Type.Array(AgentVpg),
})
export type AgentStatus = Static<typeof AgentStatus>

export const Checkpoint = Type.Object({
  id: CheckpointId,
  atUnixMs: UnixMs,
  kind: Type.Union([Type.Literal('automatic'), Type.Literal('tagged')]),
  tag: Type.Optional(Type.String()),
  state: CheckpointState,
})
export type Checkpoint = Static<typeof Checkpoint>

export const RecoveryPoint = Type.Object({
  pointId: Type.String(),
  vpg: VpgName,
  checkpointId: CheckpointId,
  atUnixMs: UnixMs,
  /** One read-only NBD export per disk; `uri` as nbdinfo and qemu-img take it. */
  disks: Type.Array(Type.Object({ vmId: VmId, key: Type.String(), sizeBytes: Bytes, uri: Type.String() })),
})
export type RecoveryPoint = Static<typeof RecoveryPoint>

const PointId = Type.String({ pattern: '^[A-Za-z0-9._-]{1,64}$', description: 'expected the id of a recovery point' })

/** What the agent's API offers, beside GET /v1/events. */
export const agentApi = {
  status: { method: 'GET', path: '/v1/status', answer: AgentStatus },
  createPairingToken: {
    method: 'POST',
    path: '/v1/pairing-tokens',
    body: Request({
      /** The agent's address as the protected site reaches it. */
      host: Type.String({ pattern: '^[A-Za-z0-9._:%-]{1,253}$', description: 'expected a host name or an IP address' }),
      /** The port that the agent listens on, if not given. */
      port: Type.Optional(Type.Integer({ minimum: 1, maximum: 65_535, description: 'expected a port from 1 to 65535' })),
      validForMs: Type.Optional(Type.Integer({ minimum: 1000, maximum: 86_400_000, description: 'expected 1000 to 86400000 ms' })),
    }),
    answer: Type.Object({ token: Type.String(), expiresAtUnixMs: UnixMs }),
  },
  listCheckpoints: {
    method: 'GET',
    path: '/v1/vpgs/:name/checkpoints',
    params: Request({ name: VpgName }),
    /** Both ends included; the newest `limit` of what lies between, newest first. */
    query: Request({
      limit: Type.Integer({ minimum: 1, maximum: 10_000, default: 100, description: 'expected 1 to 10000' }),
      fromUnixMs: Type.Optional(UnixMs),
      toUnixMs: Type.Optional(UnixMs),
    }),
    answer: Type.Object({ checkpoints: Type.Array(Checkpoint) }),
  },
  openPoint: {
    method: 'POST',
    path: '/v1/points',
    body: Request({
      vpg: VpgName,
      /** An id, "latest", "latest-tagged", or the newest one not after a time. All but an id take only what is valid or proved. */
      checkpoint: Type.Union([CheckpointId, Request({ atUnixMs: UnixMs })], {
        description: 'expected a checkpoint id, "latest", "latest-tagged" or {"atUnixMs": time}',
      }),
    }),
    answer: RecoveryPoint,
  },
  listPoints: { method: 'GET', path: '/v1/points', answer: Type.Object({ points: Type.Array(RecoveryPoint) }) },
  closePoint: { method: 'DELETE', path: '/v1/points/:id', params: Request({ id: PointId }), answer: NoContent },
} as const satisfies Endpoints

/** What a request for a recovery point selects. */
export type CheckpointSelector = { by: 'latest' } | { by: 'latest-tagged' } | { by: 'id'; id: string } | { by: 'time'; atUnixMs: number }

export const checkpointSelector = (checkpoint: string | { atUnixMs: number }): CheckpointSelector => {
  if (typeof checkpoint !== 'string') return { by: 'time', atUnixMs: checkpoint.atUnixMs }
  if (checkpoint === 'latest' || checkpoint === 'latest-tagged') return { by: checkpoint }
  return { by: 'id', id: checkpoint }
}
