import { once } from 'node:events'
import { createServer, type AddressInfo } from 'node:net'
import { STAMP_BYTES } from '../../agent/proof/index.ts'
import { makeBlankImage, startVm, type LabVm, type VmShape } from '../lab/index.ts'
import { clusterDirOf, clusterPlugin, clusterPluginConfig, makeClusterNode } from '../lab/cluster.ts'
import { Sites, type LabDaemon } from '../lab/sites.ts'

/** A disk of the proof, in the order of its WriteHistory. */
export type ProofDisk = { vmId: number; key: string; socketPath: string }

export const VPG = 'proof'
const DISK_BYTES = 16 << 20
/** Size of each disk's stamped region; the rest of the disk stays blank. */
export const REGION_BYTES = 1 << 20
export const REGION_SECTORS = REGION_BYTES / STAMP_BYTES

const VMS: readonly { vmId: number; shape: VmShape }[] = [
  { vmId: 101, shape: '9.x' },
  { vmId: 102, shape: '8.4' },
]
const KEYS = ['scsi0', 'scsi1'] as const
/** Names of the nodes; the first VM is on the first, the second on the last. */
const NODES = ['pve1', 'pve2'] as const
export const DISK_COUNT = VMS.length * KEYS.length

/** A port of its own, so that an agent that is started again is found where it was. */
const freePort = async (): Promise<number> => {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}

/** Two VMs without an OS, in both shapes, two disks each, on one node or on two of a cluster, and both sites around them, paired; nothing is protected yet. */
export class Rig {
  readonly rootDir: string
  readonly disks: readonly ProofDisk[]
  readonly vmIds: readonly number[] = VMS.map(({ vmId }) => vmId)
  readonly sites: Sites
  /** Of all nodes; the first one is that of `sites`. */
  readonly plugins: readonly LabDaemon[]
  /** In the order of their ids. */
  readonly vms: readonly LabVm[]
  readonly #stack: AsyncDisposableStack

  private constructor(rootDir: string, disks: readonly ProofDisk[], sites: Sites, plugins: readonly LabDaemon[], vms: readonly LabVm[], stack: AsyncDisposableStack) {
    this.rootDir = rootDir
    this.disks = disks
    this.sites = sites
    this.plugins = plugins
    this.vms = vms
    this.#stack = stack
  }

  /** @param rootDir stands for / of the node; at most about 40 bytes */
  static async start(rootDir: string, nodeCount: 1 | 2 = 1): Promise<Rig> {
    await using stack = new AsyncDisposableStack()
    const clusterDir = clusterDirOf(rootDir)
    const nodes = NODES.slice(0, nodeCount).map((nodeName, index) => ({ nodeName, root: index === 0 ? rootDir : `${rootDir}/${nodeName}` }))
    if (nodeCount > 1) for (const { nodeName, root } of nodes) makeClusterNode(root, clusterDir, nodeName)
    const nodeOf = (index: number) => nodes[Math.min(index, nodes.length - 1)]
    const doorOf = (vmId: number): string => `${rootDir}/door${vmId}`
    const vms = await Promise.all(VMS.map(async ({ vmId, shape }, index) => {
      const { root, nodeName } = nodeOf(index)
      const disks = KEYS.map((key) => ({ key, path: `${rootDir}/${vmId}-${key}.raw`, format: 'raw' as const, shareRw: true, sizeBytes: DISK_BYTES }))
      for (const { path } of disks) await makeBlankImage(path, DISK_BYTES)
      // Without an OS the firmware would only reboot in a circle; what writes is the NBD server inside QEMU, through the drive's root node.
      return stack.use(await startVm({ rootDir: root, ...(nodeCount > 1 ? { nodeName } : {}), vmId, shape, disks, memoryMiB: 64, nbdServerPath: doorOf(vmId), frozen: true }))
    }))
    const config = {
      existingNbdServers: Object.fromEntries(VMS.map(({ vmId }) => [String(vmId), doorOf(vmId)])),
      // On a busy machine of two cores the thread that acknowledges may have to wait; the proof is about order, not about that limit.
      slowAck: { p99Ms: 2_000, maxMs: 10_000 },
      // QEMU's device counters do not see writes of its NBD server: a comparison would call every checkpoint suspect.
      proofEveryMs: 3_600_000,
    }
    const sites = stack.use(await Sites.start({
      rootDir,
      plugin: nodeCount > 1 ? { ...clusterPluginConfig(rootDir, clusterDir), ...config } : config,
      // Small segments: points are read from sealed, merged and open ones.
      agent: { segmentBytes: 4 << 20, listen: { host: '127.0.0.1', port: await freePort() } },
    }))
    const others = nodes.slice(1).map(({ root }) => stack.use(clusterPlugin(root, clusterDir, config)))
    for (const plugin of others) await plugin.start()
    await sites.pair()
    const disks = VMS.flatMap(({ vmId }) => KEYS.map((key) => ({ vmId, key, socketPath: doorOf(vmId) })))
    return new Rig(rootDir, disks, sites, [sites.plugin, ...others], vms, stack.move())
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack.disposeAsync()
  }
}
