import { STAMP_BYTES } from '../../agent/proof/index.ts'
import { makeBlankImage, startVm, type VmShape } from '../lab/index.ts'
import { Sites } from '../lab/sites.ts'

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
export const DISK_COUNT = VMS.length * KEYS.length

/** Two VMs without an OS, in both shapes, two disks each, and both sites around them, paired; nothing is protected yet. */
export class Rig {
  readonly rootDir: string
  readonly disks: readonly ProofDisk[]
  readonly vmIds: readonly number[] = VMS.map(({ vmId }) => vmId)
  readonly sites: Sites
  readonly #stack: AsyncDisposableStack

  private constructor(rootDir: string, disks: readonly ProofDisk[], sites: Sites, stack: AsyncDisposableStack) {
    this.rootDir = rootDir
    this.disks = disks
    this.sites = sites
    this.#stack = stack
  }

  /** @param rootDir stands for / of the node; at most about 40 bytes */
  static async start(rootDir: string): Promise<Rig> {
    await using stack = new AsyncDisposableStack()
    const doorOf = (vmId: number): string => `${rootDir}/door${vmId}`
    await Promise.all(VMS.map(async ({ vmId, shape }) => {
      const disks = KEYS.map((key) => ({ key, path: `${rootDir}/${vmId}-${key}.raw`, format: 'raw' as const, shareRw: true, sizeBytes: DISK_BYTES }))
      for (const { path } of disks) await makeBlankImage(path, DISK_BYTES)
      // Without an OS the firmware would only reboot in a circle; what writes is the NBD server inside QEMU, through the drive's root node.
      stack.use(await startVm({ rootDir, vmId, shape, disks, memoryMiB: 64, nbdServerPath: doorOf(vmId), frozen: true }))
    }))
    const sites = stack.use(await Sites.start({
      rootDir,
      plugin: {
        existingNbdServers: Object.fromEntries(VMS.map(({ vmId }) => [String(vmId), doorOf(vmId)])),
        // On a busy machine of two cores the thread that acknowledges may have to wait; the proof is about order, not about that limit.
        slowAck: { p99Ms: 2_000, maxMs: 10_000 },
        // QEMU's device counters do not see writes of its NBD server: a comparison would call every checkpoint suspect.
        proofEveryMs: 3_600_000,
      },
      // Small segments: points are read from sealed, merged and open ones.
      agent: { segmentBytes: 4 << 20 },
    }))
    await sites.pair()
    const disks = VMS.flatMap(({ vmId }) => KEYS.map((key) => ({ vmId, key, socketPath: doorOf(vmId) })))
    return new Rig(rootDir, disks, sites, stack.move())
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack.disposeAsync()
  }
}
