import { Type } from '@sinclair/typebox'
import type { Static } from '@sinclair/typebox'
import { DAYS } from './replicate/index.ts'

const CLOCK = '^([01][0-9]|2[0-3]):[0-5][0-9]$'

/** plugin.json; every path can be changed, so that the same program serves a Proxmox node and a lab below one directory. */
export const PluginConfig = Type.Object(
  {
    /** Where Proxmox keeps ID.qmp and ID.pid of running VMs. */
    qemuServerDirectory: Type.String({ default: '/var/run/qemu-server' }),
    /** Proxmox's cluster file system. */
    pveDirectory: Type.String({ default: '/etc/pve' }),
    /** Definitions of VPGs. */
    vpgFile: Type.String({ default: '/etc/pve/cdp-vpgs.json' }),
    /** What all nodes of the cluster share: site id, pairing, the authority for links between nodes; by default priv/cdp in the cluster file system. */
    siteDirectory: Type.Optional(Type.String()),
    /** This node's name in the cluster; by default where /etc/pve/local points to. */
    nodeName: Type.Optional(Type.String()),
    /** Where the other nodes of the cluster reach this one; by default at its address within the cluster. Unused while the node is alone. */
    nodeLink: Type.Object({ host: Type.Optional(Type.String()), port: Type.Integer({ default: 8766, minimum: 0, maximum: 65_535 }) }, { default: {}, additionalProperties: false }),
    /** How long acknowledgements may be held for a checkpoint over several nodes; past it the checkpoint is abandoned. */
    holdMs: Type.Integer({ default: 20, minimum: 1, maximum: 200 }),
    /** Node-local state. */
    stateDirectory: Type.String({ default: '/var/lib/pve-cdp/plugin' }),
    /** Unix sockets between QEMU and us. */
    runDirectory: Type.String({ default: '/run/pve-cdp' }),
    apiSocket: Type.String({ default: '/run/pve-cdp/plugin.sock' }),
    /** Memory for captured data that are not durable at the agent yet, per VM. */
    memoryBytesPerVm: Type.Integer({ default: 64 * 1024 * 1024, minimum: 16 * 1024 * 1024 }),
    /** Files that memory overflows to while the link is slow or gone, in a directory of their own, at most `bytesPerVm` for each VM (0: none). The file system keeps `reserveBytes` free. */
    spill: Type.Object(
      {
        directory: Type.String({ default: '/var/lib/pve-cdp/spill' }),
        bytesPerVm: Type.Integer({ default: 8 * 1024 ** 3, minimum: 0 }),
        reserveBytes: Type.Integer({ default: 8 * 1024 ** 3, minimum: 0 }),
      },
      { default: {}, additionalProperties: false },
    ),
    /** Limit of this node's streams to the recovery site, frames only; 0: none. The first window that holds, in local time, counts instead. */
    bandwidth: Type.Object(
      {
        bytesPerSec: Type.Integer({ default: 0, minimum: 0 }),
        windows: Type.Array(
          Type.Object(
            {
              days: Type.Array(Type.Union(DAYS.map((day) => Type.Literal(day))), { minItems: 1 }),
              from: Type.String({ pattern: CLOCK }),
              to: Type.String({ pattern: CLOCK }),
              bytesPerSec: Type.Integer({ minimum: 0 }),
            },
            { additionalProperties: false },
          ),
          { default: [] },
        ),
      },
      { default: {}, additionalProperties: false },
    ),
    /** How long a record may wait for others before its frame is sent. */
    lingerMs: Type.Number({ default: 10, minimum: 0, maximum: 1000 }),
    /** Limit of each VM's sync; 0: none. */
    syncRateBytesPerSec: Type.Integer({ default: 0, minimum: 0 }),
    /** Online verify of each VM: how often (0: only when asked for), and how fast (0: no limit). One VM of a node at a time. */
    verify: Type.Object(
      { everyMs: Type.Integer({ default: 7 * 24 * 3_600_000, minimum: 0 }), rateBytesPerSec: Type.Integer({ default: 32 * 1024 * 1024, minimum: 0 }) },
      { default: {}, additionalProperties: false },
    ),
    /**
     * Where QEMU keeps a protected guest's discards from the storage (it is probed), each VM with `discard=on` and a guest agent is trimmed once in `everyMs` (0: never), between `from` and `to` (local time),
     * with capture suspended for that long, at most `maxMs`.
     */
    reclaim: Type.Object(
      {
        everyMs: Type.Integer({ default: 7 * 24 * 3_600_000, minimum: 0 }),
        from: Type.String({ pattern: CLOCK, default: '02:00' }),
        to: Type.String({ pattern: CLOCK, default: '05:00' }),
        maxMs: Type.Integer({ default: 600_000, minimum: 1_000 }),
      },
      { default: {}, additionalProperties: false },
    ),
    /** How often QEMU's counters, block graph and disks are compared with what is captured: an orphaned job is found that late. */
    proofEveryMs: Type.Integer({ default: 5_000, minimum: 500 }),
    /** How often the dirty bitmaps are rotated: what a restart of the plugin copies again is what was written since the last time. */
    rotateEveryMs: Type.Integer({ default: 60_000, minimum: 500 }),
    /** While a backup is in the way of capture, an incremental round begins so often, unless the one before takes longer. */
    roundEveryMs: Type.Integer({ default: 10_000, minimum: 1_000 }),
    /** Capture lets go of a guest when its acknowledgements get slower than this. */
    slowAck: Type.Object({ p99Ms: Type.Number({ default: 20 }), maxMs: Type.Number({ default: 500 }) }, { default: {}, additionalProperties: false }),
    /** NBD servers that run inside a VM's QEMU already, by VM id: a sync reads through that one instead of starting its own. */
    existingNbdServers: Type.Record(Type.String(), Type.String(), { default: {} }),
    /** Start the watchdog process. Only a debugger wants this off. */
    watchdog: Type.Boolean({ default: true }),
    log: Type.Object(
      { level: Type.Union([Type.Literal('error'), Type.Literal('warn'), Type.Literal('info'), Type.Literal('debug'), Type.Literal('trace')], { default: 'info' }), format: Type.Union([Type.Literal('json'), Type.Literal('human')], { default: 'human' }) },
      { default: {}, additionalProperties: false },
    ),
  },
  { additionalProperties: false },
)
export type PluginConfig = Static<typeof PluginConfig>
