import { agentApi, implement, packageVersion } from '../../core/api/index.ts'
import type { AgentStatus, AgentVpg, Checkpoint, EventLog, Route } from '../../core/api/index.ts'
import type { Catalogue } from '../checkpoint/index.ts'
import type { GroupGenerations, Ingest, VmRegistry } from '../ingest/index.ts'
import type { PairingDesk } from '../pairing/index.ts'
import type { PinRegistry } from '../recovery/index.ts'
import type { RetentionKeeper } from '../retention/index.ts'
import type { ScrubKeeper } from '../scrub/index.ts'
import type { PointDesk } from './point-desk.ts'
import { deleteReplica, listReplicas } from './replica-desk.ts'
import { retentionStatus } from './retention-status.ts'
import { beginScrub, scrubStatus } from './scrub-status.ts'

export type AgentParts = {
  siteId: string
  port: () => number
  catalogue: Catalogue
  registry: VmRegistry
  ingest: Ingest
  generations: GroupGenerations
  pairing: PairingDesk
  points: PointDesk
  pins: PinRegistry
  retention: RetentionKeeper
  scrub: ScrubKeeper
  events: EventLog
  nowUnixMs: () => number
}

const vpgStatus = ({ catalogue, registry, ingest, generations, nowUnixMs }: AgentParts, siteId: string, name: string, vms: readonly string[]): AgentVpg => {
  const last = catalogue.latest(siteId, name)
  const { valid, oldestAtUnixMs } = catalogue.count(siteId, name)
  return {
    name,
    siteId,
    rpoMs: last === undefined ? null : Math.max(0, nowUnixMs() - last.atUnixMs),
    ...(last === undefined ? {} : { lastValidCheckpoint: { id: last.id, atUnixMs: last.atUnixMs } }),
    checkpoints: valid,
    ...(oldestAtUnixMs === undefined ? {} : { oldestAtUnixMs }),
    generation: generations.known(siteId, name).generation,
    vms: vms.map((vm) => {
      const store = registry.get(siteId, vm)?.store
      return {
        vmId: Number(vm), epoch: store?.epoch ?? 0, durableSeq: store?.durableSeq ?? 0, journalBytes: store?.journalBytes ?? 0,
        baseComplete: store?.baseComplete ?? false, connected: ingest.isConnected(siteId, vm),
      }
    }),
  }
}

/** The agent's contract, implemented. */
export const agentRoutes = (parts: AgentParts): Route[] => {
  const { catalogue, pairing, points } = parts
  return implement(agentApi, {
    status: async (): Promise<AgentStatus> => ({
      side: 'agent',
      siteId: parts.siteId,
      version: packageVersion(),
      sites: pairing.sites.list().map((site) => ({
        siteId: site.siteId, connected: parts.ingest.isSiteConnected(site.siteId), address: site.pairedFromAddress,
        pairedAtUnixMs: site.pairedAtUnixMs, certificateEndsAtUnixMs: site.certificateEndsAtUnixMs,
      })),
      vpgs: catalogue.listVpgs().map(({ siteId, name, vms }) => vpgStatus(parts, siteId, name, vms)),
    }),
    createPairingToken: ({ body }) => pairing.createToken({ host: body.host, port: body.port ?? parts.port(), ...(body.validForMs === undefined ? {} : { validForMs: body.validForMs }) }),
    listCheckpoints: async ({ params, query }) => {
      const siteId = points.siteOf(params.name)
      const { limit, fromUnixMs, toUnixMs } = query
      const entries = catalogue.list(siteId, params.name, { limit, ...(fromUnixMs === undefined ? {} : { fromUnixMs }), ...(toUnixMs === undefined ? {} : { toUnixMs }) })
      return {
        checkpoints: entries.map(({ id, atUnixMs, kind, tag, state }): Checkpoint => ({ id, atUnixMs, kind: kind === 'automatic' ? 'automatic' : 'tagged', ...(tag === undefined ? {} : { tag }), state })),
      }
    },
    showRetention: async ({ params }) => retentionStatus(parts, points.siteOf(params.name), params.name),
    showScrub: async () => scrubStatus(parts),
    startScrub: ({ body }) => beginScrub(parts, body.vmId),
    setRetention: async ({ params, body }) => {
      const siteId = points.siteOf(params.name)
      const before = retentionStatus(parts, siteId, params.name)
      await parts.retention.group(siteId, before.vpg)?.set(body)
      return retentionStatus(parts, siteId, params.name)
    },
    listReplicas: () => listReplicas(parts),
    deleteReplica: ({ body }) => deleteReplica(parts, body),
    openPoint: ({ body }) => points.open(body.vpg, body.checkpoint, { acceptDamaged: body.acceptDamaged === true }),
    listPoints: async () => ({ points: points.list() }),
    closePoint: async ({ params }) => {
      await points.close(params.id)
      return {}
    },
  })
}
