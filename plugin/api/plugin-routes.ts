import { implement, packageVersion, pluginApi } from '../../core/api/index.ts'
import type { PluginStatus, Route } from '../../core/api/index.ts'
import type { PluginService } from './plugin-service.ts'
import { vpgStatus } from './vpg-status.ts'

const peerStatus = (service: PluginService): PluginStatus['peer'] => {
  const { pairing } = service
  if (pairing === undefined) return { state: 'unpaired' }
  const address = `${pairing.host}:${pairing.port}`
  const vms = service.vpgs.flatMap((vpg) => vpg.vms)
  if (vms.length === 0) return { state: 'disconnected', address, reason: service.vpgs.length === 0 ? 'nothing is protected yet' : 'no protected VM is on this node' }
  return vms.some((vm) => vm.stats?.linkUp === true) ? { state: 'connected', address } : { state: 'disconnected', address, reason: 'no stream is up' }
}

/** The plugin's contract, implemented. */
export const pluginRoutes = (service: PluginService, nowUnixMs: () => number = Date.now): Route[] =>
  implement(pluginApi, {
    status: async () => ({
      side: 'plugin' as const, siteId: service.siteId, node: service.nodeName, version: packageVersion(), peer: peerStatus(service), vpgs: service.vpgs.map((vpg) => vpgStatus(vpg, nowUnixMs())),
    }),
    pair: async ({ body }) => {
      const { siteId, agentSiteId, host, port } = await service.pair(body.token)
      return { siteId, agentSiteId, address: `${host}:${port}` }
    },
    listVpgs: async () => ({ vpgs: service.vpgs.map((vpg) => vpgStatus(vpg, nowUnixMs())) }),
    createVpg: async ({ body }) => vpgStatus(await service.createVpg(body), nowUnixMs()),
    deleteVpg: async ({ params }) => {
      await service.deleteVpg(params.name)
      return {}
    },
    tagCheckpoint: async ({ params, body }) => {
      const { id, atUnixMs } = await service.vpg(params.name).tag(body.tag)
      return { checkpointId: id, atUnixMs, state: 'pending' as const }
    },
  })
