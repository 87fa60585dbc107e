// The agent daemon, the recovery site's appliance. Everything is wired here and nowhere else.
import { mkdir, statfs } from 'node:fs/promises'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { EventLog, createApi } from '../core/api/index.ts'
import { loadConfig } from '../core/config/index.ts'
import { CdpError, errorMessage } from '../core/errors/index.ts'
import { listenSecure } from '../core/link/index.ts'
import { createDaemonLog } from '../core/log/index.ts'
import { loadOrCreateAuthority, loadOrCreateServerIdentity, loadOrCreateSiteId } from '../core/pki/index.ts'
import { FrameBuffers } from '../core/stream/index.ts'
import { PointDesk, agentRoutes } from './api/index.ts'
import { Catalogue } from './checkpoint/index.ts'
import { AgentConfig } from './config.ts'
import { HashDesk } from './hashes/index.ts'
import { RunMerger } from './index/index.ts'
import { GroupGenerations, Ingest, VmRegistry } from './ingest/index.ts'
import { SegmentSealer } from './journal/index.ts'
import { MirrorStorage, chooseMirror } from './mirror/index.ts'
import { createPairingDesk } from './pairing/index.ts'
import { PinRegistry, PointServer } from './recovery/index.ts'
import { BUSY_QUEUE_BYTES, Pacer, policyFrom, RetentionKeeper } from './retention/index.ts'
import { ScrubKeeper } from './scrub/index.ts'

/** Journal that one step of a promotion reads. */
const PROMOTION_STEP_BYTES = 1024 * 1024 * 1024
/** Memory kept for frames on their way to the disk. */
const FREE_FRAME_BYTES = 64 * 1024 * 1024

const run = async (): Promise<void> => {
  const { values } = parseArgs({ options: { config: { type: 'string' } } })
  const config = await loadConfig(values.config, AgentConfig)
  const log = createDaemonLog({ level: config.log.level, format: config.log.format, fields: { daemon: 'agent' } })
  const state = config.stateDirectory
  await mkdir(state, { recursive: true, mode: 0o700 })
  await mkdir(config.runDirectory, { recursive: true, mode: 0o755 })
  const events = new EventLog()
  const siteId = await loadOrCreateSiteId(state)
  const authority = await loadOrCreateAuthority(join(state, 'pki'), { name: `pve-cdp-${siteId}` })
  const identity = await loadOrCreateServerIdentity(join(state, 'pki'), authority, { commonName: siteId })

  await using daemon = new AsyncDisposableStack()
  const catalogue = daemon.use(new Catalogue(join(state, 'catalogue.sqlite')))
  const sealer = daemon.use(new SegmentSealer())
  const merger = daemon.use(new RunMerger({ onError: (directory, error) => log.error('index runs could not be merged', { directory, error: error.message }) }))
  const buffers = new FrameBuffers(FREE_FRAME_BYTES)
  const vmsDirectory = join(state, 'vms')
  let ingest: Ingest | undefined = undefined as Ingest | undefined
  let pointServer: PointServer | undefined = undefined as PointServer | undefined
  let retention: RetentionKeeper | undefined = undefined as RetentionKeeper | undefined
  const registry = daemon.use(new VmRegistry({
    directory: vmsDirectory, catalogue, sealer, log, clock: { nowUnixMs: Date.now }, recycle: (bytes) => buffers.give(bytes),
    mirrorsOf: (vmDirectory, vmLog) => new MirrorStorage({ vmDirectory, log: vmLog, choose: (disk) => chooseMirror(config.mirrors, vmDirectory, disk) }),
    limits: { segmentBytes: config.segmentBytes, segmentRecords: config.segmentRecords },
    onValid: (site, vpg, checkpoint) => ingest?.tellValid(site, vpg, checkpoint),
    mayGrow: (site, vm, journalBytes) => retention?.mayGrow(site, vm, journalBytes),
    onRemoved: async (path) => pointServer?.forget(path),
    onDeleting: async (site, vm, vmDirectory) => {
      pins.forget(vmDirectory)
      await pointServer?.forgetVm(vmDirectory)
      await retention?.forgetVm(site, vm)
    },
    onSealed: (site, vm) => merger.notify(join(vmsDirectory, site, vm)),
  }))
  await registry.openAll()
  for (const { store } of registry.list()) merger.notify(store.directory)
  const pins = new PinRegistry()
  const hashes = daemon.use(new HashDesk({ pins }))
  const scrub = daemon.use(new ScrubKeeper({
    ...config.scrub, vms: () => registry.list(), catalogue, events, log, nowUnixMs: Date.now,
    askForSync: (site, vm, why) => ingest?.askForSync(site, vm, why) === true,
  }))
  const generations = new GroupGenerations(join(state, 'generations'), Date.now)
  const disowned = new Set<string>()
  ingest = daemon.use(new Ingest({
    registry, catalogue, generations, log, hashes, onConnected: (site, vm) => scrub.connected(site, vm), allocate: (lengthBytes) => buffers.take(lengthBytes),
    onDisowned: (site, { vm, vpg, generation }, error) => {
      // A source tries again and again; it is said once.
      const said = `${site}/${vm}/${vpg}/${generation}/${error.code}`
      if (disowned.has(said)) return
      disowned.add(said)
      const message = error.code === 'FENCED' ? `VM ${vm} of ${vpg} still sends from the protected site: ${error.message}` : `VM ${vm}: ${error.message}`
      events.append({ level: 'error', kind: error.code === 'FENCED' ? 'group.source-still-runs' : 'group.generation-behind', message, context: { siteId: site, vpg, vmId: Number(vm) } })
    },
  }))
  const streams = ingest

  const served = daemon.use(await PointServer.listen({
    socketPath: config.pointSocket, pageCacheBytes: config.pageCacheBytes, frameCacheBytes: config.frameCacheBytes, pins,
    onIndexDamage: (directory, damage) => {
      log.error('a page of an index run is damaged; it is bypassed and made again', { directory, ...damage })
      void merger.rebuild(directory, damage.path)
    },
    onJournalDamage: (directory, error) => {
      log.error('a recovery point met damage in a journal', { directory, error: error.message, ...error.context })
      events.append({ level: 'error', kind: 'journal.damaged', message: error.message, context: { directory } })
    },
  }))
  pointServer = served
  const pairing = daemon.use(await createPairingDesk({
    authority, agentSiteId: siteId, directory: join(state, 'pairing'), log,
    onPaired: (site) => void events.append({ level: 'info', kind: 'site.paired', message: `site ${site.siteId} was paired`, context: { siteId: site.siteId } }),
  }))
  const listener = daemon.use(await listenSecure({
    ...config.listen, tls: identity, log,
    onStream: (socket, peer) => streams.take(socket, peer.siteId),
    onPair: (socket) => pairing.handle(socket),
    admit: (peer) => pairing.sites.admit(peer),
  }))
  const { vpgs: ownPolicies, ...policy } = config.retention
  for (const own of [{}, ...Object.values(ownPolicies)]) policyFrom(policy, own)
  const pacer = new Pacer({ bytesPerSec: policy.promotionBytesPerSec, isBusy: () => registry.list().some(({ store }) => store.queuedBytes > BUSY_QUEUE_BYTES) })
  const keeper = daemon.use(new RetentionKeeper({
    catalogue, pins, events, log, directory: join(state, 'retention'), reserve: policy, policyOf: (vpg) => policyFrom(policy, ownPolicies[vpg]),
    storeOf: (site, vm) => registry.get(site, vm)?.store,
    space: async () => {
      const { bavail, blocks, bsize } = await statfs(vmsDirectory)
      return { freeBytes: bavail * bsize, totalBytes: blocks * bsize }
    },
    pace: (bytes, signal) => pacer.pace(bytes, signal), monotonicMs: () => performance.now(), nowUnixMs: Date.now, stepBytes: PROMOTION_STEP_BYTES,
  }))
  await keeper.start()
  retention = keeper
  scrub.start()
  const points = new PointDesk({ catalogue, registry, points: served, events })
  daemon.use(await createApi({
    socketPath: config.apiSocket, log, events,
    routes: agentRoutes({ siteId, port: () => listener.port, catalogue, registry, ingest: streams, generations, pairing, points, pins, retention: keeper, scrub, events, nowUnixMs: Date.now }),
  }))
  log.info('agent is ready', { host: listener.host, port: listener.port, api: config.apiSocket })

  const { promise: stopped, resolve: stop } = Promise.withResolvers<string>()
  process.once('SIGTERM', () => stop('SIGTERM'))
  process.once('SIGINT', () => stop('SIGINT'))
  log.info('agent stops', { signal: await stopped })
}

process.on('unhandledRejection', (error) => {
  process.stderr.write(`agent: unhandled: ${Error.isError(error) ? (error.stack ?? error.message) : String(error)}\n`)
  process.exit(70)
})
try {
  await run()
  process.exit(0)
} catch (error) {
  process.stderr.write(`agent: ${errorMessage(error)}\n${error instanceof CdpError && error.hint !== undefined ? `hint: ${error.hint}\n` : ''}`)
  process.exit(1)
}
