import { mkdir, readFile, readdir, readlink, rmdir, stat, utimes } from 'node:fs/promises'
import { hostname } from 'node:os'
import { basename, join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { CdpError, errorCode, errorMessage } from '../../core/errors/index.ts'
import { readJsonFile } from '../../core/files/index.ts'
import { readPrivateFile, writePrivateFile, ensurePrivateDirectory } from '../../core/pki/index.ts'

export type NodeAddress = { host: string; port: number }

const LOCK_TRY_MS = 100
const LOCK_DEADLINE_MS = 15_000

const isMissing = (error: unknown): boolean => errorCode(error) === 'ENOENT' || errorCode(error) === 'ENOTDIR'

/** The name that the cluster has for this node: where /etc/pve/local points to. */
export const localNodeName = async (pveDirectory: string): Promise<string> => {
  try {
    return basename(await readlink(join(pveDirectory, 'local')))
  } catch (error) {
    if (isMissing(error) || errorCode(error) === 'EINVAL') return hostname().split('.')[0]
    throw error
  }
}

/** What the nodes of a cluster tell each other through Proxmox's cluster file system: where VMs are, who there is, how to reach them. */
export class ClusterFiles {
  readonly #pveDirectory: string
  readonly #siteDirectory: string
  readonly #nodeName: string

  constructor(options: { pveDirectory: string; siteDirectory: string; nodeName: string }) {
    this.#pveDirectory = options.pveDirectory
    this.#siteDirectory = options.siteDirectory
    this.#nodeName = options.nodeName
  }

  /** Names of all nodes, sorted; empty if the cluster file system is not there. */
  async nodes(): Promise<string[]> {
    try {
      return (await readdir(join(this.#pveDirectory, 'nodes'))).sort()
    } catch (error) {
      if (isMissing(error)) return []
      throw error
    }
  }

  /** The node of each VM. A VM whose configuration lies with this node is here, whatever the list says; one that is in no list is left out. */
  async placement(vmIds: Iterable<number>): Promise<Map<number, string>> {
    const list = await this.#vmList()
    const found = new Map<number, string>()
    for (const vmId of vmIds) {
      const node = (await this.#isHere(vmId)) ? this.#nodeName : list[String(vmId)]
      // The list is older than the directory for a moment when a VM leaves.
      if (node !== undefined && (node !== this.#nodeName || (await this.#isHere(vmId)))) found.set(vmId, node)
    }
    return found
  }

  /** The address of a node within the cluster, from Proxmox's own list of members; undefined for a node that is alone. */
  async memberAddress(node: string): Promise<string | undefined> {
    const members = (await readJsonFile(join(this.#pveDirectory, '.members'))) as { nodelist?: Record<string, { ip?: unknown }> } | undefined
    const ip = members?.nodelist?.[node]?.ip
    return typeof ip === 'string' ? ip : undefined
  }

  /** Where the plugin of a node listens for the others; undefined while it has not said so. */
  async addressOf(node: string): Promise<NodeAddress | undefined> {
    const text = await readPrivateFile(this.#addressFile(node))
    if (text === undefined) return undefined
    const { host, port } = JSON.parse(text) as Partial<NodeAddress>
    return typeof host === 'string' && typeof port === 'number' ? { host, port } : undefined
  }

  async publishAddress(address: NodeAddress): Promise<void> {
    const present = await this.addressOf(this.#nodeName).catch(() => undefined)
    if (present?.host === address.host && present.port === address.port) return
    await ensurePrivateDirectory(join(this.#siteDirectory, 'nodes'))
    await writePrivateFile(this.#addressFile(this.#nodeName), `${JSON.stringify(address)}\n`)
  }

  /**
   * Runs `work` while no other node does, by the lock that Proxmox's own tools use: a directory in priv/lock, which the cluster file
   * system drops two minutes after its owner died, when somebody asks for it (utime 0).
   * @throws CdpError CONFLICT when another node holds it for too long; IO when the cluster file system cannot be written (no quorum)
   */
  async locked<T>(work: () => Promise<T>): Promise<T> {
    const path = join(this.#pveDirectory, 'priv/lock/cdp')
    const endMs = performance.now() + LOCK_DEADLINE_MS
    while (true) {
      try {
        await mkdir(path)
        break
      } catch (error) {
        if (errorCode(error) === 'ENOENT') await mkdir(join(path, '..'), { recursive: true, mode: 0o700 })
        else if (errorCode(error) !== 'EEXIST') throw new CdpError('IO', `the cluster file system cannot be changed: ${errorMessage(error)}`, { cause: error, retry: true, hint: 'Has this cluster quorum? See "pvecm status".' })
        else await this.#waitForLock(path, endMs)
      }
    }
    try {
      return await work()
    } finally {
      await rmdir(path)
    }
  }

  async #waitForLock(path: string, endMs: number): Promise<void> {
    if (performance.now() > endMs) throw new CdpError('CONFLICT', 'another node is changing the same definitions', { retry: true, hint: `Try again in two minutes; then, if no node is at it, remove ${path}.` })
    await utimes(path, 0, 0).catch(() => undefined)
    await delay(LOCK_TRY_MS)
  }

  async #vmList(): Promise<Record<string, string>> {
    let text: string
    try {
      text = await readFile(join(this.#pveDirectory, '.vmlist'), 'utf8')
    } catch (error) {
      if (isMissing(error)) return {}
      throw error
    }
    const { ids = {} } = JSON.parse(text) as { ids?: Record<string, { node?: unknown; type?: unknown }> }
    return Object.fromEntries(Object.entries(ids).flatMap(([vmId, { node, type }]) => (typeof node === 'string' && type === 'qemu' ? [[vmId, node]] : [])))
  }

  async #isHere(vmId: number): Promise<boolean> {
    try {
      await stat(join(this.#pveDirectory, 'qemu-server', `${vmId}.conf`))
      return true
    } catch (error) {
      if (isMissing(error)) return false
      throw error
    }
  }

  #addressFile(node: string): string {
    return join(this.#siteDirectory, 'nodes', `${node}.json`)
  }
}
