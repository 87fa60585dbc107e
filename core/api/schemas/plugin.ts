import { Type } from '@sinclair/typebox'
import type { Static } from '@sinclair/typebox'
import type { Endpoints } from '../endpoint.ts'
import { Bytes, CheckpointId, CheckpointState, Count, NoContent, Request, RpoMs, Seq, UnixMs, VmId, VpgName } from './common.ts'

/** Somebody who wants capture out of a VM, and until when. */
export const Hold = Type.Object({ owner: Type.String(), reason: Type.String(), sinceUnixMs: UnixMs, untilUnixMs: UnixMs })
export type Hold = Static<typeof Hold>

export const VmStatus = Type.Object({
  vmId: VmId,
  /** The node of the cluster it is on; absent if it is on none. */
  node: Type.Optional(Type.String()),
  /** unknown: it is on another node, and that one does not say. */
  state: Type.Union([Type.Literal('unknown'), Type.Literal('detached'), Type.Literal('attaching'), Type.Literal('syncing'), Type.Literal('streaming'), Type.Literal('tracking'), Type.Literal('suspended'), Type.Literal('fenced')]),
  /** Why it is in this state, a sentence for people; never empty. */
  reason: Type.String(),
  sinceUnixMs: UnixMs,
  sync: Type.Optional(
    Type.Object({
      kind: Type.String(),
      doneBytes: Bytes,
      totalBytes: Bytes,
      /** Of what was compared or copied, what went to the recovery site. */
      sentBytes: Type.Optional(Bytes),
      rateBytesPerSec: Type.Number({ minimum: 0 }),
      secondsLeft: Type.Union([Type.Number({ minimum: 0 }), Type.Null()]),
    }),
  ),
  /** Online verify: the one that runs, and the newest that came to its end. `foundEver`: how many found a difference. */
  verify: Type.Optional(
    Type.Object({
      running: Type.Optional(Type.Object({ comparedBytes: Bytes, totalBytes: Bytes })),
      last: Type.Optional(Type.Object({ atUnixMs: UnixMs, comparedBytes: Bytes, undecidedBytes: Bytes, differingBytes: Bytes, foundEver: Count })),
    }),
  ),
  /** Disks that are copied for the first time beside checkpoints, and are in none yet; `failed`: why the last try ended. */
  joining: Type.Optional(Type.Object({ keys: Type.Array(Type.String()), doneBytes: Count, totalBytes: Count, failed: Type.Optional(Type.String()) })),
  /** Incremental rounds while a backup is in the way of capture: those made since it is, and the instant of the newest. */
  rounds: Type.Optional(Type.Object({ count: Count, lastUnixMs: Type.Optional(UnixMs) })),
  /** Who holds capture suspended; absent if nobody does. */
  holds: Type.Optional(Type.Array(Hold)),
  receivedSeq: Seq,
  durableSeq: Seq,
  /** Captured and not durable at the recovery site: in memory. */
  bufferedBytes: Bytes,
  /** The same, in files of the spill. */
  spilledBytes: Type.Optional(Bytes),
  disks: Type.Array(Type.Object({ key: Type.String(), sizeBytes: Bytes })),
  /** What capture adds to a guest's write, in microseconds, over the last second. `held`: the longest wait for a group cut over several nodes; `max` includes it, the others do not. */
  ackLatencyUs: Type.Object({ p50: Type.Number({ minimum: 0 }), p99: Type.Number({ minimum: 0 }), max: Type.Number({ minimum: 0 }), held: Type.Optional(Type.Number({ minimum: 0 })) }),
})
export type VmStatus = Static<typeof VmStatus>

export const VpgStatus = Type.Object({
  name: VpgName,
  state: Type.Union([Type.Literal('initializing'), Type.Literal('protected'), Type.Literal('degraded'), Type.Literal('stopped'), Type.Literal('fenced')]),
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
  /** What this node's QEMU does with discards of protected guests. `swallowed`: they reach the storage only in a bracket, on a schedule. */
  discards: Type.Optional(Type.Object({ fate: Type.Union([Type.Literal('forwarded'), Type.Literal('swallowed'), Type.Literal('unknown')]), reason: Type.String() })),
  vpgs: Type.Array(VpgStatus),
})
export type PluginStatus = Static<typeof PluginStatus>

export const CreateVpg = Request({
  name: VpgName,
  vmIds: Type.Array(VmId, { minItems: 1, maxItems: 1000, uniqueItems: true, description: 'expected a list of one to 1000 different VM ids' }),
  checkpointEveryMs: Type.Integer({ minimum: 1000, maximum: 3_600_000, default: 5000, description: 'expected 1000 to 3600000 ms' }),
  /** Its share of a limited line, against other groups; normal if it is absent. */
  priority: Type.Optional(Type.Union([Type.Literal('low'), Type.Literal('normal'), Type.Literal('high')], { description: 'expected low, normal or high' })),
})

const oneLine = (maxLength: number): string => `expected a text of 1 to ${maxLength} characters on one line`
const Owner = Type.String({ pattern: '^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}$', description: 'expected 1 to 128 letters, digits and ._:@/-, beginning with a letter or digit' })
const VmIdParam = Request({ vmId: Type.String({ pattern: '^[1-9][0-9]{2,8}$', description: 'expected the id of a VM' }) })

export const SuspendVm = Request({
  /** Whoever asks, the same each time: holds of different owners are independent. */
  owner: Owner,
  reason: Type.String({ minLength: 1, maxLength: 200, pattern: '^[^\\u0000-\\u001f\\u007f]*$', description: oneLine(200) }),
  /** After this it ends by itself. */
  forMs: Type.Integer({ minimum: 1000, maximum: 86_400_000, default: 600_000, description: 'expected 1000 to 86400000 ms' }),
})

/** How capture of a VM stands after a suspend or resume. */
export const Suspended = Type.Object({ vmId: VmId, state: Type.String(), reason: Type.String(), holds: Type.Array(Hold) })
export type Suspended = Static<typeof Suspended>

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
  /** Compares with the recovery site again, and sends what differs; without `vmId` every VM of the group. */
  forceSync: { method: 'POST', path: '/v1/vpgs/:name/sync', params: Request({ name: VpgName }), body: Request({ vmId: Type.Optional(VmId) }), answer: Type.Object({ vmIds: Type.Array(VmId) }) },
  /** Begins an online verify; status and events tell what it found. */
  verify: { method: 'POST', path: '/v1/vpgs/:name/verify', params: Request({ name: VpgName }), body: Request({ vmId: Type.Optional(VmId) }), answer: Type.Object({ vmIds: Type.Array(VmId) }) },
  tagCheckpoint: {
    method: 'POST',
    path: '/v1/vpgs/:name/checkpoints',
    params: Request({ name: VpgName }),
    body: Request({ tag: Type.String({ minLength: 1, maxLength: 200, description: 'expected a text of 1 to 200 characters' }) }),
    answer: Type.Object({ checkpointId: CheckpointId, atUnixMs: UnixMs, state: CheckpointState }),
  },
  /** Answers when capture is out of QEMU: what Proxmox does to the disks then works. */
  suspendVm: { method: 'POST', path: '/v1/vms/:vmId/suspend', params: VmIdParam, body: SuspendVm, answer: Suspended },
  /** Answers at once; `held` is false if that owner held nothing. */
  resumeVm: { method: 'POST', path: '/v1/vms/:vmId/resume', params: VmIdParam, body: Request({ owner: Owner }), answer: Type.Composite([Suspended, Type.Object({ held: Type.Boolean() })]) },
} as const satisfies Endpoints
