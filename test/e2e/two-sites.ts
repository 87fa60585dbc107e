import { once } from 'node:events'
import { appendFileSync } from 'node:fs'
import { createServer, type AddressInfo } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { pluginApi, type Checkpoint, type VpgStatus } from '../../core/api/index.ts'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import {
  bootGuest, ioGap, lastingLeaksOf, makeExt4Image, makeTempDir, startGapMeter, tool,
  type BootGuestOptions, type Guest, type GuestJob, type IoGap, type TempDir, type VmDisk, type VmShape,
} from '../lab/index.ts'
import type { Link } from '../lab/link.ts'
import type { SiteConfig } from '../lab/site-config.ts'
import { Sites, until } from '../lab/sites.ts'
import { PointImages } from './point-images.ts'
import { qemuState, withoutBitmaps } from './qemu-state.ts'

export const VPG = 'shop'
export const KEYS = ['scsi0', 'scsi1'] as const
export const DIRS = KEYS.map((key) => `/mnt/${key}`)
export const VMS: readonly { vmId: number; shape: VmShape }[] = [{ vmId: 101, shape: '9.x' }, { vmId: 102, shape: '8.4' }]
/** Busy test machines boot slowly. */
export const BOOT_DEADLINE_MS = 180_000
export const PROTECTED_DEADLINE_MS = 90_000

export type TwoSitesOptions = {
  diskBytes?: number
  /** Its content is on every disk from the beginning. */
  fromDir?: string
  plugin?: SiteConfig
  agent?: SiteConfig
  /** Arguments for node before the plugin's program. */
  pluginNodeArgs?: string[]
  /** The line between the sites; by default loopback. */
  link?: Link
  /** Both daemons are started again when they end unasked. */
  respawns?: boolean
  /** Called with the root directory before anything is started. */
  prepare?: (rootDir: string) => Promise<void>
  /** Which of VMS are booted; all by default. */
  boot?: readonly number[]
}

/** Two real guests (9.x and 8.4, two ext4 disks each) and both daemons, paired; what a test file shares. */
export class TwoSites implements AsyncDisposable {
  readonly dir: TempDir
  readonly sites: Sites
  readonly #guests = new Map<number, Guest>()

  private constructor(dir: TempDir, sites: Sites) {
    this.dir = dir
    this.sites = sites
  }

  static async start(options: TwoSitesOptions = {}): Promise<TwoSites> {
    const { diskBytes = 64 << 20, fromDir, plugin = {}, agent = {}, pluginNodeArgs = [], link, respawns = false, prepare, boot = VMS.map(({ vmId }) => vmId) } = options
    await using stack = new AsyncDisposableStack()
    const dir = stack.use(makeTempDir())
    await prepare?.(dir.path)
    const images = VMS.flatMap(({ vmId }) => disksOf(dir.path, vmId))
    for (const { path } of images) await makeExt4Image(path, diskBytes, fromDir === undefined ? {} : { fromDir })
    // A shared test machine hesitates; that capture lets go of a guest then is another test's matter.
    const sites = stack.use(await Sites.start({ rootDir: dir.path, plugin: { slowAck: { p99Ms: 800, maxMs: 1_500 }, ...plugin }, agent: { ...(link === undefined ? { listen: { host: '127.0.0.1', port: await freePort() } } : {}), ...agent }, pluginNodeArgs, respawns, ...(link === undefined ? {} : { link }) }))
    await sites.pair()
    const all = new TwoSites(dir, sites)
    stack.defer(() => all.#endGuests())
    await Promise.all(boot.map((vmId) => all.boot(vmId)))
    stack.move()
    return all
  }

  get rootDir(): string {
    return this.dir.path
  }

  get guests(): Guest[] {
    return VMS.flatMap(({ vmId }) => this.#guests.get(vmId) ?? [])
  }

  guest(vmId: number): Guest {
    const guest = this.#guests.get(vmId)
    if (guest === undefined) throw new CdpError('NOT_FOUND', `VM ${vmId} was not booted`)
    return guest
  }

  /** Boots a VM on its disks as they are. */
  async boot(vmId: number, options: Pick<BootGuestOptions, 'onStarted' | 'signal'> = {}): Promise<Guest> {
    const { shape } = VMS.find((vm) => vm.vmId === vmId)!
    const guest = await bootGuest({ rootDir: this.rootDir, vmId, shape, disks: disksOf(this.rootDir, vmId), mount: KEYS, deadlineMs: BOOT_DEADLINE_MS, ...options })
    this.#guests.set(vmId, guest)
    return guest
  }

  async protect(checkpointEveryMs = 1_000): Promise<VpgStatus> {
    await this.sites.createVpg(VPG, VMS.map(({ vmId }) => vmId), checkpointEveryMs)
    return this.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
  }

  async vpg(): Promise<VpgStatus> {
    const vpg = (await this.sites.pluginStatus()).vpgs.find(({ name }) => name === VPG)
    if (vpg === undefined) throw new CdpError('NOT_FOUND', `the plugin knows no ${VPG}`)
    return vpg
  }

  /** Tags a checkpoint as an operator does, who tries again while the group is not in step, and waits until it is valid. */
  async tag(tag: string): Promise<Checkpoint> {
    const { checkpointId } = await until(`the tag "${tag}"`, PROTECTED_DEADLINE_MS, async () => {
      try {
        return await this.sites.plugin.answers(() => this.sites.plugin.api.call(pluginApi.tagCheckpoint, { params: { name: VPG }, body: { tag } }))
      } catch (error) {
        if (error instanceof CdpError && error.code === 'CONFLICT') return undefined
        throw error
      }
    }, async () => JSON.stringify(await this.vpg()))
    return until(`"${tag}" is valid`, 60_000, async () => (await this.sites.checkpoints(VPG)).find(({ id, state }) => id === checkpointId && (state === 'valid' || state === 'proved')))
  }

  /**
   * The differences between the protected disks and a checkpoint of this very moment, byte by byte: the guests are paused meanwhile.
   * Empty is as it has to be whenever the group is protected.
   */
  async differences(tag: string): Promise<string[]> {
    await this.sites.untilProtected(VPG, PROTECTED_DEADLINE_MS)
    const guests = this.guests
    for (const { vm } of guests) await vm.monitor.run('stop')
    try {
      const { id } = await this.tag(tag)
      using point = await PointImages.copy(this.sites, VPG, id)
      const digests = point.digests()
      const different: string[] = []
      for (const { vmId } of VMS) {
        for (const { key, path } of disksOf(this.rootDir, vmId)) {
          const { stdout } = await tool('sha256sum', [path], { deadlineMs: 120_000 })
          if (stdout.slice(0, 64) !== digests[`${vmId}/${key}`]) different.push(`VM ${vmId} ${key}`)
        }
      }
      return different
    } finally {
      for (const { vm } of guests) await vm.monitor.run('cont')
    }
  }

  /** What the plugin has told its operator since it was started, oldest first. */
  async pluginEvents(): Promise<string[]> {
    const messages: string[] = []
    for await (const { message } of this.sites.plugin.api.events({ follow: false, limit: 1_000 })) messages.push(message)
    return messages
  }

  /** The end of the logs of both daemons, for a failed test. */
  logs(characters = 4_000): string {
    return `plugin: ${this.sites.plugin.log().slice(-characters)}\nagent: ${this.sites.agent.log().slice(-characters)}`
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#endGuests()
    await this.sites[Symbol.asyncDispose]()
    const left = await lastingLeaksOf(this.rootDir)
    await this.dir[Symbol.asyncDispose]()
    if (left.length > 0) throw new CdpError('INTERNAL', `left behind: ${left.join('; ')}`)
  }

  async #endGuests(): Promise<void> {
    await Promise.all([...this.#guests.values()].map((guest) => guest[Symbol.asyncDispose]()))
  }
}

/** An agent that is started again has to be where it was. */
const freePort = async (): Promise<number> => {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}

const disksOf = (rootDir: string, vmId: number): VmDisk[] => KEYS.map((key) => ({ key, path: `${rootDir}/vm-${vmId}-${key}.raw`, format: 'raw' }))

/** Measures the guests' longest wait for a small durable write, from start() to the last look. */
export class GapMeters {
  readonly #guests: readonly Guest[]
  readonly #pauseUs: number
  #jobs: GuestJob[] = []

  /** @param pauseUs between two writes of one guest */
  constructor(guests: readonly Guest[], pauseUs = 0) {
    this.#guests = guests
    this.#pauseUs = pauseUs
  }

  /** Begins, anew after a stop: resolves when each guest has done a few writes. */
  async start(): Promise<void> {
    for (const guest of this.#guests) await guest.check('rm -f /run/lab/io-gap')
    this.#jobs = this.#guests.map((guest) => startGapMeter(guest, '/mnt/scsi0', this.#pauseUs))
    for (const guest of this.#guests) await guest.check('until [ "$(cut -d " " -f 1 /run/lab/io-gap 2>/dev/null || echo 0)" -ge 3 ]; do usleep 20000; done', { deadlineMs: 60_000 })
  }

  /** The worst of all guests so far. */
  async look(): Promise<IoGap> {
    const gaps = await Promise.all(this.#guests.map((guest) => ioGap(guest)))
    return { writes: Math.min(...gaps.map(({ writes }) => writes)), longestGapMs: Math.max(...gaps.map(({ longestGapMs }) => longestGapMs)), failed: gaps.reduce((sum, { failed }) => sum + failed, 0) }
  }

  /** Waits until each guest has written `more` times beyond `writes`: its I/O goes on. */
  async untilWrites(writes: number, more: number, deadlineMs = 60_000): Promise<IoGap> {
    return until(`${more} more writes of each guest`, deadlineMs, async () => {
      const gap = await this.look()
      return gap.writes >= writes + more ? gap : undefined
    })
  }

  async stop(): Promise<void> {
    for (const [index, job] of this.#jobs.entries()) await this.#guests[index].end(job, 'KILL')
    this.#jobs = []
  }
}

/** A moment that a seed chose: what a random time means here. */
export const atRandom = (random: { int: (low: number, high: number) => number }, lowMs: number, highMs: number): Promise<void> => delay(random.int(lowMs, highMs))

/** The error of `work` with what the guests do, and the daemons' logs, beside it. scripts/test shows it once more at its end. */
export const explained = async <T>(all: TwoSites, work: () => Promise<T>): Promise<T> => {
  try {
    return await work()
  } catch (error) {
    const guests = await Promise.all(all.guests.map(whatItDoes))
    if (process.env.CDP_DIAGNOSIS) appendFileSync(process.env.CDP_DIAGNOSIS, `${errorMessage(error)}\n${guests.join('\n')}\n`)
    throw new CdpError('INTERNAL', `${errorMessage(error)}\n${guests.join('\n')}\n${all.logs()}`, { cause: error })
  }
}

// Short, whatever waits: who has to read it has no more than this.
const BLOCKED = 'for p in /proc/[0-9]*; do case "$(sed "s/.*) //" $p/stat 2>/dev/null)" in D*) echo "$(cat $p/comm):" $(sed "s/.* //; s/+.*//" $p/stack 2>/dev/null | head -n 5);; esac; done; echo in flight: $(cat /sys/block/sd?/inflight)'

// QEMU before 10.0.7 and 10.1.3 may leave a request of an io_uring unsent until the next one comes.
const READ_ONE = 'for d in /dev/sd?; do timeout 4 dd if=$d of=/dev/null bs=4k count=1 skip=3 iflag=direct 2>/dev/null || echo "$d cannot be read"; done; echo each disk was read; df /run /mnt/* | tr -s " " | cut -d " " -f 5,6 | sed 1d; cut -d " " -f 1 /proc/loadavg'

/** For a failed test: is it there, what does QEMU hold of its disks, what in it waits for a disk, and does that go on after another request, or once QEMU's block layer was drained. */
const whatItDoes = async (guest: Guest): Promise<string> => {
  const { vm } = guest
  if (!vm.running) return `VM ${vm.vmId}: its QEMU has ended`
  const inside = () => guest.run(BLOCKED, { deadlineMs: 5_000 }).then(({ stdout }) => stdout.trim())
  const readOne = () => guest.run(READ_ONE, { deadlineMs: 20_000 }).then(({ stdout }) => stdout.trim())
  const drain = () => vm.monitor.run('transaction', { actions: [] }).then(() => 'QEMU has drained')
  const questions = [() => vm.monitor.run('query-status'), async () => withoutBitmaps(await qemuState(vm)), inside, readOne, inside, drain, inside]
  const told: string[] = []
  for (const question of questions) told.push(await question().then((answer) => (typeof answer === 'string' ? answer : JSON.stringify(answer)), errorMessage))
  return `VM ${vm.vmId}: ${told.join('\n')}`
}
