import { Type } from '@sinclair/typebox'
import type { Static } from '@sinclair/typebox'

const RetentionLimits = {
  /** 1 h to 30 d. */
  historyMs: Type.Integer({ minimum: 3_600_000, maximum: 30 * 86_400_000 }),
  /** From this age on one checkpoint in each `everyMs` stays in the list, and tagged ones. */
  thinning: Type.Array(Type.Object({ afterMs: Type.Integer({ minimum: 0 }), everyMs: Type.Integer({ minimum: 1000 }) }, { additionalProperties: false })),
  /** For the journal of one VM. Without a limit only time and the reserve of the file system bound it. */
  journalLimitBytes: Type.Integer({ minimum: 1 }),
  /** Default: three quarters of the limit. */
  warnBytes: Type.Integer({ minimum: 1 }),
  /** While something pins history, or a sync does not end, the limit may be passed up to here. Default: half as much again as the limit. */
  hardStopBytes: Type.Integer({ minimum: 1 }),
  /** A sync that would not fit the limit: grow (up to the hard stop), pause, or give-up (history, down to a last tagged checkpoint). */
  syncOverflow: Type.Union([Type.Literal('grow'), Type.Literal('pause'), Type.Literal('give-up')]),
}

const RetentionConfig = Type.Object(
  {
    historyMs: Type.Integer({ ...RetentionLimits.historyMs, default: 86_400_000 }),
    thinning: Type.Array(RetentionLimits.thinning.items, { default: [{ afterMs: 86_400_000, everyMs: 60_000 }, { afterMs: 7 * 86_400_000, everyMs: 3_600_000 }] }),
    journalLimitBytes: Type.Optional(RetentionLimits.journalLimitBytes),
    warnBytes: Type.Optional(RetentionLimits.warnBytes),
    hardStopBytes: Type.Optional(RetentionLimits.hardStopBytes),
    syncOverflow: Type.Optional(RetentionLimits.syncOverflow),
    /** What stays free on the file system of the journals. Default: the smaller of 30 GB and 15 %. */
    reserveBytes: Type.Optional(Type.Integer({ minimum: 0 })),
    reservePercent: Type.Optional(Type.Number({ minimum: 0, maximum: 90 })),
    promotionBytesPerSec: Type.Integer({ minimum: 1024 * 1024, default: 128 * 1024 * 1024 }),
    /** What is different for single VPGs, by name. */
    vpgs: Type.Record(Type.String(), Type.Partial(Type.Object(RetentionLimits), { additionalProperties: false }), { default: {} }),
  },
  { default: {}, additionalProperties: false },
)
export type RetentionConfig = Static<typeof RetentionConfig>

const strict = { additionalProperties: false }
const StoragePath = Type.String({ pattern: '^/' })
const FileKind = Type.Object({ kind: Type.Literal('file') }, strict)
const Qcow2Kind = Type.Object({ kind: Type.Literal('qcow2'), directory: Type.Optional(StoragePath) }, strict)
/** `claim`: what is there already is taken, compared with the disk, and overwritten. */
const NamedKind = (kind: 'qcow2' | 'device') => Type.Object({ kind: Type.Literal(kind), path: StoragePath, claim: Type.Optional(Type.Boolean()) }, strict)
const MirrorDefault = Type.Union([FileKind, Qcow2Kind])

/** What a disk gets as its mirror when it is first seen (docs/decisions/mirror-storage.md); one that has a mirror keeps it. */
const MirrorsConfig = Type.Object(
  {
    default: Type.Union([FileKind, Qcow2Kind], { default: { kind: 'file' } }),
    /** By VM id, or site id/VM id. */
    vms: Type.Record(
      Type.String(),
      Type.Object({ default: Type.Optional(MirrorDefault), disks: Type.Optional(Type.Record(Type.String(), Type.Union([FileKind, Qcow2Kind, NamedKind('qcow2'), NamedKind('device')]))) }, strict),
      { default: {} },
    ),
  },
  { default: {}, ...strict },
)

/** agent.json of the recovery site's appliance. */
export const AgentConfig = Type.Object(
  {
    /** Journals, mirrors, catalogue, keys. */
    stateDirectory: Type.String({ default: '/var/lib/pve-cdp/agent' }),
    runDirectory: Type.String({ default: '/run/pve-cdp' }),
    apiSocket: Type.String({ default: '/run/pve-cdp/agent.sock' }),
    /** Where recovery points are served. */
    pointSocket: Type.String({ default: '/run/pve-cdp/points.sock' }),
    listen: Type.Object({ host: Type.String({ default: '0.0.0.0' }), port: Type.Integer({ default: 8765, minimum: 0, maximum: 65_535 }) }, { default: {}, additionalProperties: false }),
    /** A segment is closed at this size or count of records. */
    segmentBytes: Type.Integer({ default: 64 * 1024 * 1024, minimum: 1024 * 1024 }),
    segmentRecords: Type.Integer({ default: 262_144, minimum: 1024 }),
    /** Memory of all open recovery points together, for pages of the index and for decoded frames. */
    pageCacheBytes: Type.Integer({ default: 64 * 1024 * 1024, minimum: 1024 * 1024 }),
    frameCacheBytes: Type.Integer({ default: 64 * 1024 * 1024, minimum: 1024 * 1024 }),
    mirrors: MirrorsConfig,
    retention: RetentionConfig,
    /** What is kept is read again this often and not faster; every 0: only when asked for. */
    scrub: Type.Object(
      { everyMs: Type.Integer({ minimum: 0, default: 7 * 86_400_000 }), rateBytesPerSec: Type.Integer({ minimum: 64 * 1024, default: 16 * 1024 * 1024 }) },
      { default: {}, additionalProperties: false },
    ),
    log: Type.Object(
      { level: Type.Union([Type.Literal('error'), Type.Literal('warn'), Type.Literal('info'), Type.Literal('debug'), Type.Literal('trace')], { default: 'info' }), format: Type.Union([Type.Literal('json'), Type.Literal('human')], { default: 'human' }) },
      { default: {}, additionalProperties: false },
    ),
  },
  { additionalProperties: false },
)
export type AgentConfig = Static<typeof AgentConfig>
