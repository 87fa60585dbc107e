import { implement, packageVersion, pluginApi } from '../../core/api/index.ts'
import type { PluginStatus, Route, Suspended } from '../../core/api/index.ts'
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

const suspended = (vm: ReturnType<PluginService['vmHere']>): Suspended => ({ vmId: vm.vmId, state: vm.state.is, reason: vm.state.why, holds: [...vm.holds] })

const discardsStatus = (discards: PluginService['discards']): NonNullable<PluginStatus['discards']> => {
  if (!discards.known) return { fate: 'unknown', reason: discards.why }
  const { reachesStorage, copied, version } = discards.fate
  if (reachesStorage && copied !== 'not') return { fate: 'forwarded', reason: `QEMU ${version} passes discards on under a mirror job, to the target as ${copied}` }
  return { fate: 'swallowed', reason: `QEMU ${version} keeps discards from the storage under a mirror job` }
}

/** The plugin's contract, implemented. */
export const pluginRoutes = (service: PluginService, nowUnixMs: () => number = Date.now): Route[] =>
  implement(pluginApi, {
    status: async () => ({
      side: 'plugin' as const, siteId: service.siteId, node: service.nodeName, version: packageVersion(), peer: peerStatus(service), discards: discardsStatus(service.discards), vpgs: service.vpgs.map((vpg) => vpgStatus(vpg, nowUnixMs())),
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
    forceSync: async ({ params, body }) => ({ vmIds: service.vpg(params.name).forceSync(body.vmId) }),
    verify: async ({ params, body }) => ({ vmIds: service.vpg(params.name).beginVerify(body.vmId) }),
    tagCheckpoint: async ({ params, body }) => {
      const { id, atUnixMs } = await service.vpg(params.name).tag(body.tag)
      return { checkpointId: id, atUnixMs, state: 'pending' as const }
    },
    suspendVm: async ({ params, body }) => {
      const vm = service.vmHere(Number(params.vmId))
      await vm.suspend(body)
      return suspended(vm)
    },
    resumeVm: async ({ params, body }) => {
      const vm = service.vmHere(Number(params.vmId))
      const held = await vm.resume(body.owner)
      return { ...suspended(vm), held }
    },
  })
