import type { Scrub } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import type { Catalogue } from '../checkpoint/index.ts'
import type { VmRegistry } from '../ingest/index.ts'
import type { ScrubbedVm, ScrubKeeper } from '../scrub/index.ts'

export type ScrubParts = { catalogue: Catalogue; registry: VmRegistry; scrub: ScrubKeeper }

const damageOf = ({ store }: ScrubbedVm): Scrub['vms'][number]['damage'] => [
  ...store.damageBook.journal.map(({ firstSeq, lastSeq, what, foundAtUnixMs, healedFromSeq }) => ({ what: `records ${firstSeq} to ${lastSeq}: ${what}`, foundAtUnixMs: foundAtUnixMs ?? 0, healed: healedFromSeq !== undefined })),
  ...store.damageBook.mirror.map(({ disk, offsetBytes, lengthBytes, what, foundAtUnixMs, healedFromSeq }) => ({
    what: `${store.disks.find((one) => one.disk === disk)?.key ?? `disk ${disk}`} at ${offsetBytes} (${lengthBytes} bytes of the mirror): ${what}`, foundAtUnixMs, healed: healedFromSeq !== undefined,
  })),
]

export const scrubStatus = async ({ catalogue, scrub }: ScrubParts): Promise<Scrub> => ({
  everyMs: scrub.everyMs,
  rateBytesPerSec: scrub.rateBytesPerSec,
  vms: (await scrub.list()).map((one) => {
    const { siteId, vm, record, totalBytes, isHopeless } = one
    const checkpoints = catalogue.damaged(siteId, vm)
    return {
      vmId: Number(vm), siteId, isHopeless, damage: damageOf(one),
      ...(record.pass === undefined ? {} : { running: { startedAtUnixMs: record.pass.startedAtUnixMs, readBytes: record.pass.readBytes, totalBytes } }),
      ...(record.last === undefined ? {} : { last: record.last }),
      ...(checkpoints === undefined ? {} : { checkpoints }),
    }
  }),
})

/** @throws CdpError NOT_FOUND */
export const beginScrub = async ({ registry, scrub }: ScrubParts, vmId: number | undefined): Promise<{ vmIds: number[] }> => {
  const vms = registry.list().filter(({ vm }) => vmId === undefined || vm === String(vmId))
  if (vmId !== undefined && vms.length === 0) throw new CdpError('NOT_FOUND', `there is no replica of VM ${vmId} here`, { hint: 'See "pvecdp scrub show" for those that there are.' })
  await scrub.want(vms)
  return { vmIds: vms.map(({ vm }) => Number(vm)) }
}
