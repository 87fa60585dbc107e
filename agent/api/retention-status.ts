import type { Retention } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import type { Catalogue } from '../checkpoint/index.ts'
import type { VmRegistry } from '../ingest/index.ts'
import type { PinRegistry } from '../recovery/index.ts'
import { spanMs } from '../retention/index.ts'
import type { GroupKeeper, RetentionKeeper } from '../retention/index.ts'

export type RetentionParts = { catalogue: Catalogue; registry: VmRegistry; retention: RetentionKeeper; pins: PinRegistry }

/** Pins and damage hold it; else it was cut short; else it is as long as it should be, or still on the way there. */
const limitedBy = (group: GroupKeeper): Retention['limitedBy'] => group.heldBy ?? group.state.shortenedBy ?? (group.isFilling ? 'filling' : 'time')

const promotionOf = ({ progress }: GroupKeeper): Retention['promotion'] =>
  progress === undefined ? null : { vmId: Number(progress.vm), checkpointId: progress.target.id, toUnixMs: progress.target.atUnixMs, doneBytes: progress.doneBytes, totalBytes: progress.totalBytes }

/** What there is of a group's history and what bounds it. @throws CdpError NOT_FOUND */
export const retentionStatus = ({ catalogue, registry, retention, pins }: RetentionParts, siteId: string, vpg: string): Retention => {
  const group = retention.group(siteId, vpg)
  const vms = catalogue.listVpgs().find((one) => one.siteId === siteId && one.name === vpg)?.vms
  if (group === undefined || vms === undefined) throw new CdpError('NOT_FOUND', `the history of ${vpg} has not been looked at yet`, { retry: true, hint: 'Ask again in a few seconds.' })
  const { policy } = group
  const oldest = catalogue.oldest(siteId, vpg)
  const newest = catalogue.latest(siteId, vpg)
  const stores = vms.flatMap((vm) => registry.get(siteId, vm) ?? [])
  return {
    vpg, siteId,
    policy: {
      historyMs: policy.historyMs, thinning: [...policy.thinning], journalLimitBytes: policy.journalLimitBytes ?? null, warnBytes: policy.warnBytes ?? null,
      hardStopBytes: policy.hardStopBytes ?? null, promotionBytesPerSec: policy.promotionBytesPerSec, syncOverflow: policy.syncOverflow,
    },
    ...(oldest === undefined ? {} : { from: { id: oldest.id, atUnixMs: oldest.atUnixMs } }),
    ...(newest === undefined ? {} : { to: { id: newest.id, atUnixMs: newest.atUnixMs } }),
    checkpoints: catalogue.count(siteId, vpg).valid,
    lengthMs: Math.round(spanMs(group.state.clock)),
    limitedBy: limitedBy(group),
    pins: stores.flatMap(({ vm, store }) =>
      pins.list().filter(({ vmDirectory }) => vmDirectory === store.directory).map(({ reason, sinceUnixMs, seq }) => ({ vmId: Number(vm), reason, sinceUnixMs, atSeq: seq }))),
    vms: stores.map(({ vm, store }) => ({ vmId: Number(vm), journalBytes: store.journalBytes, baseSeq: store.baseSeq, durableSeq: store.durableSeq, condition: store.condition })),
    promotion: promotionOf(group),
    space: retention.space,
    alarms: group.alarms.map(({ id, level, message, vm, sinceUnixMs }) => ({ id, level, message, sinceUnixMs, ...(vm === undefined ? {} : { vmId: Number(vm) }) })),
  }
}
