// The plugin daemon: protects the VMs of one Proxmox node. Everything is wired here and nowhere else.
import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { EventLog, createApi } from '../core/api/index.ts'
import { loadConfig } from '../core/config/index.ts'
import { CdpError, errorMessage } from '../core/errors/index.ts'
import { createDaemonLog } from '../core/log/index.ts'
import { PluginService, pluginRoutes } from './api/index.ts'
import { Cluster } from './cluster/index.ts'
import { PluginConfig } from './config.ts'
import { Watchdog } from './watchdog/index.ts'

const run = async (): Promise<void> => {
  const { values } = parseArgs({ options: { config: { type: 'string' } } })
  const config = await loadConfig(values.config, PluginConfig)
  const log = createDaemonLog({ level: config.log.level, format: config.log.format, fields: { daemon: 'plugin' } })
  await mkdir(config.stateDirectory, { recursive: true, mode: 0o700 })
  await mkdir(config.runDirectory, { recursive: true, mode: 0o755 })
  const events = new EventLog()

  // Loading the API's server blocks this thread for a while: before the watchdog looks, and before a guest depends on it.
  await import('fastify')

  await using daemon = new AsyncDisposableStack()
  const siteDirectory = config.siteDirectory ?? join(config.pveDirectory, 'priv/cdp')
  const cluster = daemon.use(await Cluster.open({
    pveDirectory: config.pveDirectory, siteDirectory, link: config.nodeLink, log, ...(config.nodeName === undefined ? {} : { nodeName: config.nodeName }),
  }))
  const service = new PluginService({
    cluster, siteDirectory, vpgFile: config.vpgFile, holdMs: config.holdMs, bandwidth: config.bandwidth, reclaim: config.reclaim,
    log,
    events,
    settings: {
      paths: { qemuServerDirectory: config.qemuServerDirectory, pveDirectory: config.pveDirectory },
      stateDirectory: config.stateDirectory, runDirectory: config.runDirectory, memoryBytesPerVm: config.memoryBytesPerVm, spill: config.spill, lingerMs: config.lingerMs,
      syncRateBytesPerSec: config.syncRateBytesPerSec, verify: config.verify, proofEveryMs: config.proofEveryMs, rotateEveryMs: config.rotateEveryMs, roundEveryMs: config.roundEveryMs, slowAck: config.slowAck, existingNbdServers: config.existingNbdServers,
    },
  })
  if (config.watchdog) {
    const watchdog = daemon.use(new Watchdog({ log, healthy: () => service.healthy }))
    watchdog.start()
  }
  daemon.use(service)
  await service.start()
  daemon.use(await createApi({ socketPath: config.apiSocket, routes: pluginRoutes(service), log, events }))
  log.info('plugin is ready', { api: config.apiSocket })

  const { promise: stopped, resolve: stop } = Promise.withResolvers<string>()
  process.once('SIGTERM', () => stop('SIGTERM'))
  process.once('SIGINT', () => stop('SIGINT'))
  log.info('plugin stops', { signal: await stopped })
}

process.on('unhandledRejection', (error) => {
  process.stderr.write(`plugin: unhandled: ${Error.isError(error) ? (error.stack ?? error.message) : String(error)}\n`)
  process.exit(70)
})
try {
  await run()
  process.exit(0)
} catch (error) {
  process.stderr.write(`plugin: ${errorMessage(error)}\n${error instanceof CdpError && error.hint !== undefined ? `hint: ${error.hint}\n` : ''}`)
  process.exit(1)
}
