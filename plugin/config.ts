import { Type } from '@sinclair/typebox'
import type { Static } from '@sinclair/typebox'

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
    /** How long a record may wait for others before its frame is sent. */
    lingerMs: Type.Number({ default: 10, minimum: 0, maximum: 1000 }),
    /** Limit of each VM's sync; 0: none. */
    syncRateBytesPerSec: Type.Integer({ default: 0, minimum: 0 }),
    /** How often QEMU's counters are compared with the captured bytes. */
    proofEveryMs: Type.Integer({ default: 30_000, minimum: 500 }),
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
