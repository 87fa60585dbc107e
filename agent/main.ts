// The agent daemon, the recovery site's appliance. Everything is wired here and nowhere else.
import { mkdir } from 'node:fs/promises'
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
import { RunMerger } from './index/index.ts'
import { Ingest, VmRegistry } from './ingest/index.ts'
import { SegmentSealer } from './journal/index.ts'
import { createPairingDesk } from './pairing/index.ts'
import { PinRegistry, PointServer } from './recovery/index.ts'

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
  const registry = daemon.use(new VmRegistry({
    directory: vmsDirectory, catalogue, sealer, log, clock: { nowUnixMs: Date.now }, recycle: (bytes) => buffers.give(bytes),
    limits: { segmentBytes: config.segmentBytes, segmentRecords: config.segmentRecords },
    onValid: (site, vpg, checkpoint) => ingest?.tellValid(site, vpg, checkpoint),
    onSealed: (site, vm) => merger.notify(join(vmsDirectory, site, vm)),
  }))
  await registry.openAll()
  for (const { store } of registry.list()) merger.notify(store.directory)
  ingest = daemon.use(new Ingest({ registry, catalogue, log, allocate: (lengthBytes) => buffers.take(lengthBytes) }))
  const streams = ingest

  const pointServer = daemon.use(await PointServer.listen({
    socketPath: config.pointSocket, pageCacheBytes: config.pageCacheBytes, frameCacheBytes: config.frameCacheBytes, pins: new PinRegistry(),
    onIndexDamage: (directory, damage) => {
      log.error('a page of an index run is damaged; it is bypassed and made again', { directory, ...damage })
      void merger.rebuild(directory, damage.path)
    },
    onJournalDamage: (directory, error) => {
      log.error('a recovery point met damage in a journal', { directory, error: error.message, ...error.context })
      events.append({ level: 'error', kind: 'journal.damaged', message: error.message, context: { directory } })
    },
  }))
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
  const points = new PointDesk({ catalogue, registry, points: pointServer, events })
  daemon.use(await createApi({
    socketPath: config.apiSocket, log, events,
    routes: agentRoutes({ siteId, port: () => listener.port, catalogue, registry, ingest: streams, pairing, points, nowUnixMs: Date.now }),
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
