import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { pluginApi, type VmStatus } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import { NbdClient } from '../../core/nbd/index.ts'
import { PointImages } from '../e2e/point-images.ts'
import { lastingLeaksOf, makeBlankImage, makeTempDir, startVm } from '../lab/index.ts'
import { Link, type LinkOptions } from '../lab/link.ts'
import type { SiteConfig } from '../lab/site-config.ts'
import { Sites, until } from '../lab/sites.ts'

export const VPG = 'shop'
const VM_ID = 101
const KEY = 'scsi0'

export type DiskRigOptions = { diskBytes: number; spillBytes?: number; link?: LinkOptions; plugin?: SiteConfig; agent?: SiteConfig }
/** A tagged checkpoint and what the disk held when it was cut. */
export type Snapshot = { checkpointId: string; sha256: string }

/** One VM without an OS, whose disk this process writes through QEMU, and both sites with a line between them: for what depends on bytes and time, not on a guest. */
export class DiskRig implements AsyncDisposable {
  readonly sites: Sites
  readonly link: Link
  /** Of the VM's disk. */
  readonly client: NbdClient
  readonly #diskPath: string
  readonly #stack: AsyncDisposableStack

  private constructor(sites: Sites, link: Link, client: NbdClient, diskPath: string, stack: AsyncDisposableStack) {
    this.sites = sites
    this.link = link
    this.client = client
    this.#diskPath = diskPath
    this.#stack = stack
  }

  /** Paired; nothing is protected yet. */
  static async start({ diskBytes, spillBytes = 0, link: linkOptions, plugin = {}, agent = {} }: DiskRigOptions): Promise<DiskRig> {
    await using stack = new AsyncDisposableStack()
    const dir = stack.use(makeTempDir())
    stack.defer(async () => {
      const left = await lastingLeaksOf(dir.path)
      if (left.length > 0) throw new CdpError('INTERNAL', `left behind: ${left.join('; ')}`)
    })
    const diskPath = `${dir.path}/disk.raw`
    const door = `${dir.path}/door`
    await makeBlankImage(diskPath, diskBytes)
    const link = stack.use(await Link.create(linkOptions))
    stack.use(await startVm({ rootDir: dir.path, vmId: VM_ID, shape: '9.x', disks: [{ key: KEY, path: diskPath, format: 'raw', shareRw: true, sizeBytes: diskBytes }], memoryMiB: 64, nbdServerPath: door, frozen: true }))
    const sites = stack.use(await Sites.start({
      rootDir: dir.path, link,
      // QEMU's device counters do not see writes of its NBD server; and how fast a shared machine acknowledges, or whether it lets a process breathe, is no matter here.
      plugin: {
        watchdog: false,
        existingNbdServers: { [VM_ID]: door }, slowAck: { p99Ms: 2_000, maxMs: 10_000 }, proofEveryMs: 3_600_000,
        spill: { directory: `${dir.path}/spill`, bytesPerVm: spillBytes, reserveBytes: 0 }, ...plugin,
      },
      agent,
    }))
    await sites.pair()
    const client = stack.use(await NbdClient.connect({ path: door }, { exportName: KEY }))
    return new DiskRig(sites, link, client, diskPath, stack.move())
  }

  async protect(checkpointEveryMs = 1_000, deadlineMs = 60_000): Promise<void> {
    await this.sites.createVpg(VPG, [VM_ID], checkpointEveryMs)
    await this.sites.untilProtected(VPG, deadlineMs)
  }

  async vm(): Promise<VmStatus> {
    const vm = (await this.sites.pluginStatus()).vpgs[0]?.vms[0]
    if (vm === undefined) throw new CdpError('NOT_FOUND', 'nothing is protected')
    return vm
  }

  /** What the plugin has told its operator about the VM and the line. */
  async events(): Promise<string[]> {
    const messages: string[] = []
    for await (const { message } of this.sites.plugin.api.events({ follow: false, limit: 1_000 })) messages.push(message)
    return messages
  }

  /** While nothing is being written. */
  async snapshot(): Promise<Snapshot> {
    const { checkpointId } = await this.sites.plugin.api.call(pluginApi.tagCheckpoint, { params: { name: VPG }, body: { tag: 'sample' } })
    const hash = createHash('sha256')
    for await (const chunk of createReadStream(this.#diskPath)) hash.update(chunk as Buffer)
    return { checkpointId, sha256: hash.digest('hex') }
  }

  async untilValid(checkpointId: string, deadlineMs: number): Promise<void> {
    await until(`checkpoint ${checkpointId} is valid`, deadlineMs, async () => (await this.sites.checkpoints(VPG, 10_000)).some(({ id, state }) => id === checkpointId && (state === 'valid' || state === 'proved')) || undefined,
      async () => JSON.stringify(await this.vm()))
  }

  /** What the recovery site shows of the disk at a checkpoint. */
  async sha256Of(checkpointId: string): Promise<string> {
    using images = await PointImages.copy(this.sites, VPG, checkpointId)
    return images.images[0].sha256
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#stack.disposeAsync()
  }
}
