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
  /** Grows when the group is handed over; streams of an older one are refused. */
  generation: Type.Optional(Type.Integer({ minimum: 1 })),
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

const CheckpointPlace = Type.Object({ id: CheckpointId, atUnixMs: UnixMs })
const BytesOrNone = Type.Union([Bytes, Type.Null()])

/** What becomes of a sync that would not fit the limit of a journal. */
const SyncOverflow = Type.Union([Type.Literal('grow'), Type.Literal('pause'), Type.Literal('give-up')], { description: 'expected grow, pause or give-up' })

/** How much history a group has, and why not more. */
export const Retention = Type.Object({
  vpg: VpgName,
  siteId: Type.String(),
  policy: Type.Object({
    historyMs: Type.Integer(),
    thinning: Type.Array(Type.Object({ afterMs: Type.Integer(), everyMs: Type.Integer() })),
    journalLimitBytes: BytesOrNone,
    warnBytes: BytesOrNone,
    hardStopBytes: BytesOrNone,
    promotionBytesPerSec: Type.Integer(),
    syncOverflow: SyncOverflow,
  }),
  /** What can be recovered: from the oldest to the newest checkpoint that is valid or proved. */
  from: Type.Optional(CheckpointPlace),
  to: Type.Optional(CheckpointPlace),
  checkpoints: Count,
  /** Length of the history by the agent's own clock of it, which no change of a wall clock moves. */
  lengthMs: Type.Integer({ minimum: 0 }),
  /** filling: it is still getting longer. pin, damage: history could be promoted, and this holds it. */
  limitedBy: Type.Union([Type.Literal('filling'), Type.Literal('time'), Type.Literal('size'), Type.Literal('reserve'), Type.Literal('pin'), Type.Literal('damage'), Type.Literal('no-checkpoint')]),
  pins: Type.Array(Type.Object({ vmId: VmId, reason: Type.String(), sinceUnixMs: UnixMs, atSeq: Seq })),
  vms: Type.Array(Type.Object({ vmId: VmId, journalBytes: Bytes, baseSeq: Seq, durableSeq: Seq, condition: Type.String() })),
  promotion: Type.Union([Type.Object({ vmId: VmId, checkpointId: Type.String(), toUnixMs: UnixMs, doneBytes: Bytes, totalBytes: Bytes }), Type.Null()]),
  /** Of the file system of the journals. */
  space: Type.Object({ freeBytes: Bytes, totalBytes: Bytes, reserveBytes: Bytes }),
  alarms: Type.Array(Type.Object({ id: Type.String(), level: Type.Union([Type.Literal('warn'), Type.Literal('error')]), message: Type.String(), vmId: Type.Optional(VmId), sinceUnixMs: UnixMs })),
})
export type Retention = Static<typeof Retention>

/** How the scrub of the VMs stands, and what it found. */
export const Scrub = Type.Object({
  /** From the beginning of a pass over a VM to the next; 0: only when asked for. */
  everyMs: Type.Integer({ minimum: 0 }),
  rateBytesPerSec: Type.Integer({ minimum: 1 }),
  vms: Type.Array(
    Type.Object({
      vmId: VmId,
      siteId: Type.String(),
      running: Type.Optional(Type.Object({ startedAtUnixMs: UnixMs, readBytes: Bytes, totalBytes: Bytes })),
      last: Type.Optional(Type.Object({ startedAtUnixMs: UnixMs, endedAtUnixMs: UnixMs, readBytes: Bytes, damagedFound: Count })),
      /** `healed`: the newest checkpoints do not need it any more. */
      damage: Type.Array(Type.Object({ what: Type.String(), foundAtUnixMs: UnixMs, healed: Type.Boolean() })),
      /** What needs the damage. */
      checkpoints: Type.Optional(Type.Object({ vpg: VpgName, count: Count, oldest: CheckpointPlace, newest: CheckpointPlace })),
      /** No sync is known to mend all of it. */
      isHopeless: Type.Boolean(),
    }),
  ),
})
export type Scrub = Static<typeof Scrub>

/** The replica of one VM. left: its group does not have it any more; silent: its group has it, and it is not connected. */
export const Replica = Type.Object({
  siteId: Type.String(),
  vmId: VmId,
  vpg: Type.Optional(VpgName),
  state: Type.Union([Type.Literal('protected'), Type.Literal('silent'), Type.Literal('left')]),
  journalBytes: Bytes,
  mirrorBytes: Bytes,
  /** Those that need it. */
  checkpoints: Count,
  /** What reads it now. */
  readers: Type.Array(Type.String()),
})
export type Replica = Static<typeof Replica>

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
  showRetention: { method: 'GET', path: '/v1/vpgs/:name/retention', params: Request({ name: VpgName }), answer: Retention },
  /** What is chosen here holds over what is configured. */
  setRetention: { method: 'POST', path: '/v1/vpgs/:name/retention', params: Request({ name: VpgName }), body: Request({ syncOverflow: SyncOverflow }), answer: Retention },
  showScrub: { method: 'GET', path: '/v1/scrub', answer: Scrub },
  /** Begins a pass now; without `vmId` over every VM. */
  startScrub: { method: 'POST', path: '/v1/scrub', body: Request({ vmId: Type.Optional(VmId) }), answer: Type.Object({ vmIds: Type.Array(VmId) }) },
  listReplicas: { method: 'GET', path: '/v1/replicas', answer: Type.Object({ replicas: Type.Array(Replica) }) },
  /** For good. `confirm`: the id of the VM once more. `withCheckpoints`: also if checkpoints need it, which are then lost for the whole group. */
  deleteReplica: {
    method: 'POST',
    path: '/v1/replicas/delete',
    body: Request({ vmId: VmId, confirm: Type.String({ maxLength: 64 }), siteId: Type.Optional(Type.String({ maxLength: 64 })), withCheckpoints: Type.Optional(Type.Boolean()) }),
    answer: Type.Object({ siteId: Type.String(), checkpoints: Count }),
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
      /** Also one that needs something damaged, named by its id: what is damaged cannot be read. */
      acceptDamaged: Type.Optional(Type.Boolean()),
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
