import { CdpError, errorMessage } from '../../core/errors/index.ts'
import { isInside } from '../journal/index.ts'
import type { Damage, MirrorDamage, SegmentInfo, VmStore } from '../journal/index.ts'
import { Judge } from './judge.ts'

export type Found = { damage: Damage[]; mirror?: MirrorDamage[]; /** Header, run or trailer: made again. */ mended: string[]; readBytes: number }

/** What the disk says of a file that was there; whatever else fails is no damage, and is tried again. */
const UNREADABLE = new Set(['EIO', 'ENOENT'])

/**
 * Reads one segment and notes in memory what is damaged in it. What is damaged beside its frames is made again from them.
 * @returns undefined if the segment is gone by now
 */
export const scrubSegment = async (store: VmStore, info: SegmentInfo, rateBytesPerSec: number | undefined, nowUnixMs: number): Promise<Found | undefined> => {
  const before = store.damageBook.journal
  const { segmentNumber: segment, firstSeq, lastSeq, sealed } = info
  let found: Damage[]
  let readBytes = 0
  const mended: string[] = []
  try {
    const verified = await store.verifySegment(info, rateBytesPerSec)
    readBytes = verified.readBytes
    found = verified.bad.filter(({ part }) => part === 'frames').map((bad) => ({
      segment, firstSeq: bad.firstSeq, lastSeq: bad.lastSeq, what: bad.what, ...(bad.fromBytes === undefined || bad.toBytes === undefined ? {} : { fromBytes: bad.fromBytes, toBytes: bad.toBytes }),
    }))
    for (const { part, what } of verified.bad) if (part !== 'frames' && sealed && found.length === 0) mended.push(what)
    if (mended.length > 0) store.sealAgain(info)
  } catch (error) {
    if (!store.segments.includes(info) || store.condition === 'closed') return undefined
    if (!(error instanceof CdpError) || !UNREADABLE.has(String(error.context.code))) throw error
    found = [{ segment, firstSeq, lastSeq, what: `the segment cannot be read: ${errorMessage(error)}` }]
  }
  if (!store.segments.includes(info)) return undefined
  store.damageBook.confirmSegment(info, found, nowUnixMs)
  const isKnown = (damage: Damage): boolean => before.some((one) => one.segment === damage.segment && one.firstSeq <= damage.firstSeq && one.lastSeq >= damage.lastSeq)
  return { damage: store.damageBook.journal.filter((damage) => isInside(info, damage) && !isKnown(damage)), mended, readBytes }
}

/**
 * Compares a part of a mirror disk with its checksums, and notes in memory what is damaged in it.
 * @returns undefined if that cannot be done now
 */
export const scrubMirror = async (store: VmStore, { disk, offsetBytes }: { disk: number; offsetBytes: number }, maxBytes: number, nowUnixMs: number, signal: AbortSignal): Promise<(Found & { nextBytes: number | undefined }) | undefined> => {
  const checked = await store.base.checkMirror(disk, offsetBytes, maxBytes, signal)
  if (checked === undefined) return undefined
  const before = store.damageBook.mirror
  const { bad, nextBytes, readBytes } = checked
  if (nextBytes !== undefined) store.damageBook.confirmMirror(disk, offsetBytes, nextBytes - offsetBytes, bad.map((one) => ({ disk, ...one, foundAtUnixMs: nowUnixMs })))
  return { damage: [], mirror: store.damageBook.mirror.filter((one) => !before.includes(one)), mended: [], readBytes, nextBytes }
}

/** Looks at what somebody met and no scrub has looked at. @returns what is damaged indeed */
export const scrubSuspects = async (store: VmStore, nowUnixMs: number): Promise<Found> => {
  const all: Found = { damage: [], mended: [], readBytes: 0 }
  for (const suspect of store.damageBook.unconfirmed) {
    const info = store.segments.find((one) => isInside(one, suspect))
    if (info === undefined) {
      store.damageBook.confirm(suspect, nowUnixMs)
      all.damage.push(...store.damageBook.journal.filter(({ firstSeq, segment }) => firstSeq === suspect.firstSeq && segment === suspect.segment))
      continue
    }
    const found = await scrubSegment(store, info, undefined, nowUnixMs)
    all.damage.push(...(found?.damage ?? []))
    all.mended.push(...(found?.mended ?? []))
  }
  return all
}

/**
 * Looks which of these checkpoints (ascending) no longer need what is damaged, and notes it.
 * @returns damage that the newest of them needs; `hopeless`: of which nobody knows what it was about, so that no sync is known to mend it
 */
export const judgeDamage = async (store: VmStore, namedSeqs: readonly number[]): Promise<{ needed: (Damage | MirrorDamage)[]; hopeless: Damage[]; healed: (Damage | MirrorDamage)[] }> => {
  await using judge = new Judge(store)
  const needed: (Damage | MirrorDamage)[] = []
  const healed: (Damage | MirrorDamage)[] = []
  const hopeless: Damage[] = []
  const settle = (damage: Damage | MirrorDamage, healedFromSeq: number | undefined): void => {
    if (healedFromSeq === undefined) return void needed.push(damage)
    store.damageBook.heal(damage, healedFromSeq)
    healed.push(damage)
  }
  for (const damage of store.damageBook.journal) {
    if (damage.healedFromSeq !== undefined) continue
    if ((await judge.extentsOf(damage)) === undefined) hopeless.push(damage)
    else settle(damage, await judge.healedFrom(damage, namedSeqs))
  }
  for (const damage of store.damageBook.mirror) if (damage.healedFromSeq === undefined) settle(damage, await judge.mirrorHealedFrom(damage, namedSeqs))
  return { needed, hopeless, healed }
}
