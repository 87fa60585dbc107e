import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { CdpError, errorCode, errorMessage } from '../../core/errors/index.ts'
import { listenSecure } from '../../core/link/index.ts'
import type { SecureListener } from '../../core/link/index.ts'
import type { Logger } from '../../core/log/index.ts'
import { ensurePrivateDirectory, loadOrCreateAuthority, loadOrCreateSiteId } from '../../core/pki/index.ts'
import type { CutParticipant } from '../checkpoint/index.ts'
import { ClusterFiles, localNodeName } from './cluster-files.ts'
import { serveNode } from './node-door.ts'
import { issueNodeIdentity } from './node-identity.ts'
import type { NodeIdentity } from './node-identity.ts'
import { NodeLink } from './node-link.ts'
import type { NodeReport } from './node-link.ts'
import type { NodeHandlers } from './wire.ts'

export type ClusterOptions = {
  pveDirectory: string
  /** What all nodes of the cluster share, in the cluster file system. */
  siteDirectory: string
  nodeName?: string
  /** Where this node listens for the others; without a host: at its address within the cluster. */
  link: { host?: string; port: number }
  log: Logger
}

const HOLD_ANSWER_MS = 1_000
const COMMIT_ANSWER_MS = 2_000
const TAG_ANSWER_MS = 10_000

/** The cluster as one of its nodes sees it: the site they are together, where VMs are, links to the nodes that matter. */
export class Cluster implements AsyncDisposable {
  readonly nodeName: string
  readonly siteId: string
  readonly #options: ClusterOptions
  readonly #files: ClusterFiles
  readonly #links = new Map<string, NodeLink>()
  #nodes = new Set<string>()
  #handlers: NodeHandlers | undefined
  #identity: NodeIdentity | undefined
  #listener: SecureListener | undefined
  #trouble = ''

  private constructor(options: ClusterOptions, nodeName: string, siteId: string, files: ClusterFiles) {
    this.#options = options
    this.nodeName = nodeName
    this.siteId = siteId
    this.#files = files
  }

  /** @throws CdpError IO when there is no site id yet and the cluster file system cannot be written */
  static async open(options: ClusterOptions): Promise<Cluster> {
    const { pveDirectory, siteDirectory } = options
    const nodeName = options.nodeName ?? (await localNodeName(pveDirectory))
    const files = new ClusterFiles({ pveDirectory, siteDirectory, nodeName })
    const siteId = await onceInCluster(files, siteDirectory, 'site-id', () => loadOrCreateSiteId(siteDirectory))
    const cluster = new Cluster(options, nodeName, siteId, files)
    // Now, while nothing depends on this process: loading what makes certificates blocks it for a while.
    if ((await files.nodes()).length > 1) await cluster.#identify().catch((error: unknown) => options.log.warn('this node has no certificate for the others yet', { error: errorMessage(error) }))
    return cluster
  }

  /** From now on other nodes are answered; the door opens as soon as there are any. */
  serve(handlers: NodeHandlers): void {
    this.#handlers = handlers
  }

  /** Runs `work` while no other node changes what the nodes share. */
  locked<T>(work: () => Promise<T>): Promise<T> {
    return this.#files.locked(work)
  }

  /** The node of each VM that is somewhere. */
  placement(vmIds: Iterable<number>): Promise<Map<number, string>> {
    return this.#files.placement(vmIds)
  }

  /** Called every second: opens the door when there are other nodes, and keeps links to `wanted` and to no others. */
  async tend(wanted: ReadonlySet<string>): Promise<void> {
    try {
      this.#nodes = new Set(await this.#files.nodes())
      if (this.#nodes.size > 1) await this.#openDoor()
      this.#trouble = ''
    } catch (error) {
      if (this.#trouble !== errorMessage(error)) this.#options.log.error('this node cannot be reached by the other nodes', { error })
      this.#trouble = errorMessage(error)
    }
    for (const [node, link] of this.#links) {
      if (wanted.has(node)) continue
      this.#links.delete(node)
      await link[Symbol.asyncDispose]()
    }
    for (const node of wanted) if (node !== this.nodeName && !this.#links.has(node)) this.#dial(node)
  }

  /** What another node says of its members, or why nothing is known. */
  report(node: string): { known: true; vpgs: NodeReport } | { known: false; why: string } {
    const link = this.#links.get(node)
    return link?.report() ?? { known: false, why: this.#whyNoLink(node) }
  }

  /** Another node as part of a group cut. */
  participant(node: string): CutParticipant {
    const link = (): NodeLink => this.#link(node)
    return {
      node,
      hold: async (vpg, cutId, holdMs) => link().ask('hold', { vpg, cutId, holdMs }, HOLD_ANSWER_MS),
      commit: async (vpg, cutId, mark) => link().ask('commit', { vpg, cutId, mark }, COMMIT_ANSWER_MS),
      release: async (vpg, cutId) => link().ask('release', { vpg, cutId }, HOLD_ANSWER_MS),
    }
  }

  /** Has another node, the coordinator of that group, cut a tagged checkpoint. */
  async tag(node: string, vpg: string, tag: string): Promise<{ id: string; atUnixMs: number }> {
    return this.#link(node).ask('tag', { vpg, tag }, TAG_ANSWER_MS)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const links = [...this.#links.values()]
    this.#links.clear()
    await Promise.all([...links.map((link) => link[Symbol.asyncDispose]()), this.#listener?.[Symbol.asyncDispose]()])
    this.#listener = undefined
  }

  #link(node: string): NodeLink {
    const link = this.#links.get(node)
    if (link === undefined) throw new CdpError('UNREACHABLE', this.#whyNoLink(node), { retry: true })
    return link
  }

  #whyNoLink(node: string): string {
    return this.#trouble === '' ? `node ${node} is not connected yet` : `node ${node} is not connected: ${this.#trouble}`
  }

  #dial(node: string): void {
    const identity = this.#identity
    if (identity === undefined || !this.#nodes.has(node)) return
    const link = new NodeLink({ node, address: () => this.#files.addressOf(node), tls: identity.client, log: this.#options.log })
    this.#links.set(node, link)
    link.start()
  }

  async #identify(): Promise<NodeIdentity> {
    const { siteDirectory } = this.#options
    this.#identity ??= await issueNodeIdentity(
      await onceInCluster(this.#files, siteDirectory, 'authority.pem', () => loadOrCreateAuthority(siteDirectory, { name: `pve-cdp-${this.siteId}` })), this.nodeName)
    return this.#identity
  }

  async #openDoor(): Promise<void> {
    const handlers = this.#handlers
    if (this.#listener !== undefined || handlers === undefined) return
    const { link, log } = this.#options
    const identity = await this.#identify()
    const host = link.host ?? (await this.#files.memberAddress(this.nodeName))
    if (host === undefined) throw new CdpError('IO', 'this node has no address within the cluster', { hint: 'See "pvecm status", or set nodeLink.host in plugin.json.' })
    this.#listener = await listenSecure({
      host, port: link.port, tls: identity.server, log,
      admit: ({ siteId: node }) => (this.#nodes.has(node) && node !== this.nodeName ? undefined : `${node} is no other node of this cluster`),
      onNode: (socket, { siteId: node }) => serveNode(socket, node, handlers, log),
    })
    log.info('other nodes can connect', { host, port: this.#listener.port })
    await this.#files.publishAddress({ host, port: this.#listener.port })
  }
}

/** What is made once in a cluster is made under its lock; reading what is there needs neither lock nor quorum. */
const onceInCluster = async <T>(files: ClusterFiles, siteDirectory: string, name: string, loadOrCreate: () => Promise<T>): Promise<T> => {
  try {
    await stat(join(siteDirectory, name))
    return await loadOrCreate()
  } catch (error) {
    if (errorCode(error) !== 'ENOENT') throw error
  }
  return files.locked(async () => {
    await ensurePrivateDirectory(siteDirectory)
    return loadOrCreate()
  })
}
