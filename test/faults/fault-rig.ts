import { randomFillSync } from 'node:crypto'
import { globSync, mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { pluginApi } from '../../core/api/index.ts'
import { BOOT_DEADLINE_MS, DIRS, PROTECTED_DEADLINE_MS, TwoSites, VMS, VPG } from '../e2e/two-sites.ts'
import { bootGuest, GroupWriter, makeExt4Image, makeTempDir, startJournalWriter, untilRecord, type Guest } from '../lab/index.ts'
import { Link } from '../lab/link.ts'
import { until } from '../lab/sites.ts'
import { SlowDisk } from '../lab/slow-disk.ts'
import { SmallDisk } from '../lab/small-disk.ts'
import type { RigKind } from './matrix.ts'

const MiB = 1 << 20
/** The VM that is hit, and whose work brings the phases about. */
export const HIT = 101
const CONTROL = 103
const LINK_DISK = '/mnt/scsi0'
/** Above it the oldest history is promoted, at a pace that lasts and is not overtaken by what the cells write, one after the other. */
export const PROMOTING = { journalLimitBytes: 64 * MiB, hardStopBytes: 1024 * MiB, promotionBytesPerSec: 2 * MiB }

/** Where a guest's journal writer has written since it was booted, one folder on each disk; and where the records go that both guests write in turn. */
type Life = { number: number }

/**
 * Two real guests that write, both sites, a line between them that can be hurt, disks that can be filled or slowed down, and a third guest that is not
 * protected: what it waits is this machine's doing.
 */
export class FaultRig implements AsyncDisposable {
  readonly all: TwoSites
  readonly link: Link
  readonly control: Guest
  readonly journalDisk: SmallDisk | SlowDisk
  readonly spillDisk: SmallDisk | SlowDisk
  /** A checkpoint whose content is known. */
  known: { id: string; atUnixMs: number; digests: Record<string, string> } | undefined
  readonly #lives = new Map<number, Life>()
  #chain: { writer: GroupWriter; folder: string } | undefined
  #chains = 0
  readonly #stack: AsyncDisposableStack

  private constructor(parts: Pick<FaultRig, 'all' | 'link' | 'control' | 'journalDisk' | 'spillDisk'>, stack: AsyncDisposableStack) {
    this.all = parts.all
    this.link = parts.link
    this.control = parts.control
    this.journalDisk = parts.journalDisk
    this.spillDisk = parts.spillDisk
    this.#stack = stack
  }

  static async start({ slowDisks, promotes, watched }: RigKind): Promise<FaultRig> {
    await using stack = new AsyncDisposableStack()
    const files = stack.use(makeTempDir())
    const content = `${files.path}/content`
    mkdirSync(content)
    writeFileSync(`${content}/random`, randomFillSync(Buffer.alloc(16 * MiB)))
    const journalDisk = stack.use(slowDisks ? await SlowDisk.mount(`${files.path}/agent`, 3 * 1024 * MiB) : await SmallDisk.mount(`${files.path}/agent`, 3 * 1024 * MiB))
    const spillDisk = stack.use(slowDisks ? await SlowDisk.mount(`${files.path}/spill`, 1024 * MiB, { synchronous: true }) : await SmallDisk.mount(`${files.path}/spill`, 1024 * MiB))
    const link = stack.use(await Link.create())
    const all = stack.use(await TwoSites.start({
      fromDir: content, diskBytes: 96 * MiB, link, respawns: true, pluginNodeArgs: ['--inspect=127.0.0.1:0'],
      plugin: { watchdog: watched, syncRateBytesPerSec: 12 * MiB, memoryBytesPerVm: 16 * MiB, spill: { directory: spillDisk.path, bytesPerVm: 512 * MiB, reserveBytes: 0 } },
      agent: { stateDirectory: journalDisk.path, segmentBytes: 4 * MiB, retention: { reserveBytes: 0, ...(promotes ? PROMOTING : {}) } },
    }))
    const image = `${all.rootDir}/control.raw`
    await makeExt4Image(image, 16 * MiB)
    const control = stack.use(await bootGuest({ rootDir: all.rootDir, vmId: CONTROL, shape: '9.x', disks: [{ key: 'scsi0', path: image, format: 'raw' }], mount: ['scsi0'], deadlineMs: BOOT_DEADLINE_MS }))
    const rig = new FaultRig({ all, link, control, journalDisk, spillDisk }, stack.move())
    for (const { vmId } of VMS) await rig.beginLife(vmId)
    rig.beginChain()
    return rig
  }

  /** The journal writer of a guest that has just been booted, in folders of its own. */
  async beginLife(vmId: number): Promise<void> {
    const number = (this.#lives.get(vmId)?.number ?? 0) + 1
    this.#lives.set(vmId, { number })
    const guest = this.all.guest(vmId)
    startJournalWriter(guest, DIRS.map((dir) => `${dir}${this.lifeOf(vmId)}`))
    await untilRecord(guest, 10, { deadlineMs: BOOT_DEADLINE_MS })
  }

  /** The folder of a guest's present journal writer. */
  lifeOf(vmId: number): string {
    return `/life${this.#lives.get(vmId)?.number ?? 0}`
  }

  /** Records that depend on each other, in turn on both guests. */
  beginChain(): void {
    const folder = `/chain${++this.#chains}`
    this.#chain = { folder, writer: new GroupWriter(VMS.map(({ vmId }) => ({ guest: this.all.guest(vmId), dir: `${LINK_DISK}${folder}` }))) }
  }

  async endChain(): Promise<void> {
    const chain = this.#chain
    this.#chain = undefined
    await chain?.writer.stop()
  }

  get chain(): { folder: string; durable: number } | undefined {
    return this.#chain && { folder: this.#chain.folder, durable: this.#chain.writer.durable }
  }

  async isProtected(): Promise<boolean> {
    return (await this.all.sites.pluginStatus()).vpgs.length > 0
  }

  /** Both sites as if nothing had ever been protected. */
  async forget(): Promise<void> {
    const { sites } = this.all
    this.known = undefined
    if (!(await this.isProtected())) return
    await sites.plugin.api.call(pluginApi.deleteVpg, { params: { name: VPG } })
    await sites.agent.stop()
    for (const path of globSync(`${this.journalDisk.path}/{vms,retention,catalogue.sqlite*}`)) rmSync(path, { recursive: true })
    await sites.agent.start()
  }

  /** So much that does not compress, written by the VM that is hit. */
  async write(mebibytes: number): Promise<void> {
    await this.all.guest(HIT).check(`for n in $(seq ${Math.ceil(mebibytes / 8)}); do dd if=/mnt/scsi0/random of=/mnt/scsi1/more-$((n % 3)) bs=1M count=8 conv=fsync 2>/dev/null; done`, { deadlineMs: 240_000 })
  }

  async untilSyncing(kind: string): Promise<void> {
    await until(`a ${kind} sync is under way`, PROTECTED_DEADLINE_MS, async () => (await this.all.vpg()).vms.some(({ vmId, sync }) => vmId === HIT && sync?.kind === kind && sync.doneBytes > 0) || undefined,
      async () => JSON.stringify((await this.all.vpg()).vms))
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.endChain().catch(() => undefined)
    await this.#stack.disposeAsync()
  }
}
