import type { EventLog, Replica } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import type { Catalogue } from '../checkpoint/index.ts'
import type { Ingest, RegisteredVm, VmRegistry } from '../ingest/index.ts'
import { mirrorBytes } from '../mirror/index.ts'
import type { PinRegistry } from '../recovery/index.ts'
import type { RetentionKeeper } from '../retention/index.ts'

export type ReplicaParts = { catalogue: Catalogue; registry: VmRegistry; ingest: Ingest; pins: PinRegistry; retention: RetentionKeeper; events: EventLog }

const vpgOf = ({ catalogue }: ReplicaParts, { siteId, vm }: RegisteredVm): string | undefined => catalogue.listVpgs().find((vpg) => vpg.siteId === siteId && vpg.vms.includes(vm))?.name

const takenBytes = async ({ store }: RegisteredVm): Promise<number> => {
  let bytes = 0
  for (const { disk } of store.disks) bytes += await mirrorBytes(store.directory, disk)
  return bytes
}

/** Every replica that is here, also of VMs that left their group. */
export const listReplicas = async (parts: ReplicaParts): Promise<{ replicas: Replica[] }> => ({
  replicas: await Promise.all(parts.registry.list().map(async (found) => {
    const { siteId, vm, store } = found
    const vpg = vpgOf(parts, found)
    return {
      siteId, vmId: Number(vm), ...(vpg === undefined ? {} : { vpg }), state: parts.ingest.isConnected(siteId, vm) ? 'protected' as const : vpg === undefined ? 'left' as const : 'silent' as const,
      journalBytes: store.journalBytes, mirrorBytes: await takenBytes(found), checkpoints: parts.catalogue.countWith(siteId, vm),
      readers: parts.pins.list().filter(({ vmDirectory }) => vmDirectory === store.directory).map(({ reason }) => reason),
    }
  })),
})

/**
 * Deletes the replica of one VM for good.
 * @throws CdpError NOT_FOUND; BAD_INPUT if the name was not given twice; CONFLICT while it is protected or read, or checkpoints need it that were not given up, too
 */
export const deleteReplica = async (parts: ReplicaParts, asked: { vmId: number; confirm: string; siteId?: string; withCheckpoints?: boolean }): Promise<{ siteId: string; checkpoints: number }> => {
  const { registry, catalogue, ingest, pins, retention, events } = parts
  const vm = String(asked.vmId)
  const found = registry.list().filter((one) => one.vm === vm && (asked.siteId === undefined || one.siteId === asked.siteId))
  if (found.length === 0) throw new CdpError('NOT_FOUND', `there is no replica of VM ${vm} here`, { hint: 'See "pvecdp replica list".' })
  if (found.length > 1) throw new CdpError('CONFLICT', `${found.length} sites have a VM ${vm}`, { hint: 'Name the site, too.', context: { sites: found.map(({ siteId }) => siteId).join(' ') } })
  if (asked.confirm !== vm) throw new CdpError('BAD_INPUT', `"${asked.confirm}" is not the VM that is to be deleted`, { hint: `To delete the replica of VM ${vm} for good, confirm with ${vm}.` })
  const [{ siteId }] = found
  let checkpoints = 0
  const vpg = vpgOf(parts, found[0])
  await registry.remove(siteId, vm, ({ store }) => {
    if (ingest.isConnected(siteId, vm)) throw new CdpError('CONFLICT', `VM ${vm} is protected`, { hint: 'End its protection first: take it out of its VPG, or delete that.' })
    const reader = pins.list().find(({ vmDirectory }) => vmDirectory === store.directory)
    if (reader !== undefined) throw new CdpError('CONFLICT', `the replica of VM ${vm} is in use: ${reader.reason}`, { hint: 'Close what reads it; see "pvecdp point list".' })
    checkpoints = catalogue.countWith(siteId, vm)
    if (asked.withCheckpoints === true || (vpg === undefined && checkpoints === 0)) return
    throw new CdpError('CONFLICT', vpg === undefined ? `${checkpoints} checkpoints need the replica of VM ${vm}` : `VM ${vm} is a member of VPG ${vpg}, of which ${checkpoints} checkpoints need it`, {
      hint: 'They are lost for every VM of the group. Wait until they have left the history, or give them up with --with-checkpoints.', context: { checkpoints },
    })
  })
  const isGroupGone = catalogue.listVpgs().find((one) => one.siteId === siteId && one.name === vpg)?.vms.every((member) => registry.get(siteId, member) === undefined)
  if (vpg !== undefined && isGroupGone === true) {
    catalogue.forgetVpg(siteId, vpg)
    await retention.forget(siteId, vpg)
  }
  events.append({ level: 'warn', kind: 'replica.deleted', message: `the replica of VM ${vm} was deleted, with ${checkpoints} checkpoints that needed it`, context: { siteId, vm, checkpoints } })
  return { siteId, checkpoints }
}
