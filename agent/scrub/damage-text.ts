import type { DiskEntry } from '../../core/record/index.ts'
import type { Catalogue } from '../checkpoint/index.ts'
import type { Damage, MirrorDamage } from '../journal/index.ts'

const SHOWN = 4

/** Ranges of disks for people: "scsi0 at 65536 (4096 bytes), ..."; undefined: nobody knows. */
export const whereText = (extents: readonly { disk: number; offsetBytes: number; lengthBytes: number }[] | undefined, disks: readonly DiskEntry[]): string => {
  if (extents === undefined) return 'of which disks nobody knows'
  const keyOf = (disk: number): string => disks.find((one) => one.disk === disk)?.key ?? `disk ${disk}`
  const shown = extents.slice(0, SHOWN).map(({ disk, offsetBytes, lengthBytes }) => `${keyOf(disk)} at ${offsetBytes} (${lengthBytes} bytes)`)
  if (extents.length === 0) return 'of ranges that were written again'
  return `of ${shown.join(', ')}${extents.length > SHOWN ? ` and ${extents.length - SHOWN} more` : ''}`
}

/** Which checkpoints need it. */
export const affectedText = (affected: ReturnType<Catalogue['damaged']>): string => {
  if (affected === undefined) return 'no checkpoint needs it'
  const at = ({ id, atUnixMs }: { id: string; atUnixMs: number }): string => `${id} of ${new Date(atUnixMs).toISOString()}`
  if (affected.count === 1) return `checkpoint ${at(affected.oldest)} of VPG ${affected.vpg} needs what is damaged`
  return `${affected.count} checkpoints of VPG ${affected.vpg} need what is damaged, from ${at(affected.oldest)} to ${at(affected.newest)}`
}

export const damageText = ({ firstSeq, lastSeq, what, healedFromSeq }: Damage, where: string, affected: ReturnType<Catalogue['damaged']>): string =>
  `records ${firstSeq} to ${lastSeq}, ${where}, are damaged (${what}); ${affectedText(affected)}${healedFromSeq === undefined ? '' : '; the newest are whole'}`

export const mirrorText = (damage: MirrorDamage, disks: readonly DiskEntry[], affected: ReturnType<Catalogue['damaged']>): string =>
  `the mirror ${whereText([damage], disks)} is damaged (${damage.what}); ${affectedText(affected)}`
