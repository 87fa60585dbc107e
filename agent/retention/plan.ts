import type { PinInfo } from '../recovery/index.ts'
import type { Alarm } from './alarms.ts'
import { agedOut, isAtOrBefore, spanMs } from './history-clock.ts'
import type { Candidate, HistoryClock } from './history-clock.ts'
import { KEEP_FOR_RESERVE, LIMIT_BEGIN, LIMIT_GOAL, SHORT_ERROR, SHORT_WARNING } from './policy.ts'
import type { RetentionPolicy } from './policy.ts'

/** Finds checkpoints of one group that may become its oldest: valid or proved, not suspect, not pending. */
export type CandidateFinder = {
  /** The newest that goes beyond none of these sequences; VMs not named have no limit. */
  newestAtOrBelow: (limits: ReadonlyMap<string, number>) => Candidate | undefined
  /** The oldest that does not come before `seq` in the journal of `vm`. */
  oldestAtOrAbove: (vm: string, seq: number) => Candidate | undefined
}

export type VmFacts = {
  vm: string
  baseSeq: number
  journalBytes: number
  /** The base that frees so many bytes of segments; undefined if none can be freed. */
  seqThatFrees: (bytes: number) => number | undefined
  pins: readonly PinInfo[]
  /** The first damaged sequence above the base, if the newest states need it too. */
  damagedSeq: number | undefined
  /** Of a sync that has begun and not ended: no checkpoint comes that its bytes could go into the mirror with. */
  syncBytes?: number
  /** Every checkpoint needs something damaged, of the journal or the mirror. */
  isDamaged?: boolean
}

export type PlanFacts = {
  policy: RetentionPolicy
  clock: HistoryClock
  /** The history has not been as long as it should be yet, and nothing was given up early. */
  isFilling: boolean
  vms: readonly VmFacts[]
  /** What this group should free because its file system is below its reserve; 0 if it is not. */
  reserveShareBytes: number
  find: CandidateFinder
}

export type MoveReason = 'time' | 'size' | 'reserve'
export type Plan = {
  /** Where the base of every VM moves to; undefined: nowhere. */
  target: (Candidate & { why: MoveReason }) | undefined
  /** What holds the base although it should move. */
  heldBy: 'pin' | 'damage' | 'no-checkpoint' | undefined
  alarms: Alarm[]
}

/** The later of two in order of sequences; the first if they do not compare. */
const later = <T extends Candidate>(a: T | undefined, b: T | undefined): T | undefined => (a === undefined ? b : b !== undefined && isAtOrBefore(a, b) ? b : a)

/** The earliest checkpoint with which every VM has freed what it should. */
const toFree = (facts: PlanFacts, bytesOf: (vm: VmFacts) => number, missing: () => void): Candidate | undefined => {
  let found: Candidate | undefined
  for (const vm of facts.vms) {
    const bytes = bytesOf(vm)
    const seq = bytes > 0 ? vm.seqThatFrees(bytes) : undefined
    if (seq === undefined) continue
    // Where no checkpoint is so late, the newest one frees most.
    const candidate = facts.find.oldestAtOrAbove(vm.vm, seq) ?? facts.find.newestAtOrBelow(new Map([[vm.vm, Infinity]]))
    if (candidate === undefined) missing()
    found = later(found, candidate)
  }
  return found
}

const limitsOf = (candidate: Candidate): Map<string, number> => new Map(Object.entries(candidate.seqs))

/** Which limit each VM's pins and damage set. */
const ceilings = (vms: readonly VmFacts[]): Map<string, number> => {
  const limits = new Map<string, number>()
  for (const { vm, pins, damagedSeq } of vms) limits.set(vm, Math.min(...pins.map(({ seq }) => seq), damagedSeq === undefined ? Infinity : damagedSeq - 1))
  return limits
}

const lowered = (limits: Map<string, number>, others: ReadonlyMap<string, number>): Map<string, number> => {
  const both = new Map(limits)
  for (const [vm, seq] of others) both.set(vm, Math.min(seq, both.get(vm) ?? Infinity))
  return both
}

/**
 * Where the base of a group should move, and what an operator must know. Pure; order is by sequence throughout, and age by the history
 * clock, so that no wall clock can throw history away.
 */
export const planRetention = (facts: PlanFacts): Plan => {
  const { policy, clock, vms, find } = facts
  const alarms: Alarm[] = []
  let noCheckpoint = false
  const missing = (): void => void (noCheckpoint = true)
  const { journalLimitBytes: limitBytes } = policy
  const totalBytes = vms.reduce((sum, vm) => sum + vm.journalBytes, 0)

  const aged = agedOut(clock, policy.historyMs)
  const byTime = aged && find.newestAtOrBelow(limitsOf(aged))
  const countedBytes = ({ journalBytes, syncBytes = 0 }: VmFacts): number => (policy.syncOverflow === 'give-up' ? journalBytes : journalBytes - syncBytes)
  const bySize = limitBytes === undefined ? undefined : toFree(facts, (vm) => (countedBytes(vm) > limitBytes * LIMIT_BEGIN ? countedBytes(vm) - limitBytes * LIMIT_GOAL : 0), missing)
  const forReserve = totalBytes === 0 ? undefined : toFree(facts, ({ journalBytes }) => (facts.reserveShareBytes * journalBytes) / totalBytes, missing)
  const keep = agedOut(clock, policy.historyMs * KEEP_FOR_RESERVE)
  const byReserve = forReserve && keep && find.newestAtOrBelow(lowered(limitsOf(keep), limitsOf(forReserve)))

  const moves = (candidate: Candidate): boolean => vms.some(({ vm, baseSeq }) => (candidate.seqs[vm] ?? 0) > baseSeq)
  const because = (candidate: Candidate | undefined, why: MoveReason) => (candidate !== undefined && moves(candidate) ? { ...candidate, why } : undefined)
  let target = later(later(because(byTime, 'time'), because(bySize, 'size')), because(byReserve, 'reserve'))
  const isDamaged = vms.some((vm) => vm.isDamaged === true || vm.damagedSeq !== undefined)
  const shouldMove = aged !== undefined || noCheckpoint
  let heldBy: Plan['heldBy'] = target !== undefined || !shouldMove ? undefined : isDamaged ? 'damage' : noCheckpoint ? 'no-checkpoint' : undefined
  if (target !== undefined) {
    const wanted = target
    const limits = ceilings(vms)
    const held = vms.filter(({ vm }) => (wanted.seqs[vm] ?? 0) > (limits.get(vm) ?? Infinity))
    if (held.length > 0) {
      const pins = held.flatMap((vm) => vm.pins.filter(({ seq }) => seq < (wanted.seqs[vm.vm] ?? 0)))
      heldBy = pins.length > 0 ? 'pin' : 'damage'
      if (pins.length > 0) alarms.push({ id: 'retention.pinned', level: 'warn', message: `history is kept longer than asked for: ${[...new Set(pins.map(({ reason }) => reason))].join(', ')}` })
      target = because(find.newestAtOrBelow(lowered(limitsOf(wanted), limits)), wanted.why)
    }
  }
  for (const { vm, damagedSeq, isDamaged: isMirrorDamaged } of vms) {
    if (damagedSeq !== undefined) alarms.push({ id: 'retention.damaged', vm, level: 'error', message: `the journal of VM ${vm} is damaged from sequence ${damagedSeq} on: nothing from there on goes into the mirror` })
    else if (isMirrorDamaged === true) alarms.push({ id: 'retention.damaged', vm, level: 'error', message: `the replica of VM ${vm} is damaged, and no checkpoint is whole: the base stays where it is until a sync has mended it` })
  }
  alarms.push(...sizeAlarms(facts, heldBy), ...historyAlarms(facts))
  if (facts.reserveShareBytes > 0) alarms.push({ id: 'retention.reserve', level: 'warn', message: 'the file system of the journals has less free than its reserve: history gets shorter' })
  return { target, heldBy, alarms }
}

/** The choice is to pause, and there is something to be paused. */
export const isSyncPaused = ({ syncOverflow, journalLimitBytes }: RetentionPolicy, journalBytes: number, syncBytes: number): boolean =>
  syncOverflow === 'pause' && journalLimitBytes !== undefined && syncBytes > 0 && journalBytes >= journalLimitBytes

/** The choice is to give history up for a sync, and it is time to. */
export const givesUpForSync = ({ policy: { syncOverflow, journalLimitBytes }, vms }: Pick<PlanFacts, 'policy' | 'vms'>): boolean =>
  syncOverflow === 'give-up' && journalLimitBytes !== undefined && vms.some(({ journalBytes, syncBytes = 0 }) => syncBytes > 0 && journalBytes > journalLimitBytes * LIMIT_BEGIN)

const sizeAlarms = ({ policy, vms }: PlanFacts, heldBy: Plan['heldBy']): Alarm[] => {
  const { journalLimitBytes, warnBytes, hardStopBytes } = policy
  const why = heldBy === 'pin' ? '; a pin holds it' : heldBy === 'damage' ? '; damage holds it' : heldBy === 'no-checkpoint' ? '; there is no checkpoint to move to' : ''
  return vms.flatMap(({ vm, journalBytes, syncBytes = 0 }): Alarm[] => {
    if (hardStopBytes !== undefined && journalBytes >= hardStopBytes) return [{ id: 'retention.hard-stop', vm, level: 'error', message: `the journal of VM ${vm} is at its hard stop and takes nothing more${why}` }]
    if (isSyncPaused(policy, journalBytes, syncBytes)) return [{ id: 'retention.sync-paused', vm, level: 'error', message: `a sync of VM ${vm} would not fit the limit of its journal: it is paused, as configured, until the limit is raised or the choice is another one` }]
    if (journalLimitBytes !== undefined && syncBytes > 0 && journalBytes > journalLimitBytes && policy.syncOverflow === 'grow') return [{ id: 'retention.over-limit', vm, level: 'warn', message: `the journal of VM ${vm} is above its limit: a sync makes it grow, as configured, up to its hard stop` }]
    if (journalLimitBytes !== undefined && journalBytes > journalLimitBytes) return [{ id: 'retention.over-limit', vm, level: 'error', message: `the journal of VM ${vm} is above its limit${why}` }]
    if (warnBytes !== undefined && journalBytes > warnBytes) return [{ id: 'retention.journal-large', vm, level: 'warn', message: `the journal of VM ${vm} is above its warning threshold` }]
    return []
  })
}

const historyAlarms = ({ policy, clock, isFilling }: PlanFacts): Alarm[] => {
  const part = spanMs(clock) / policy.historyMs
  if (isFilling || part >= SHORT_WARNING) return []
  return [{ id: 'retention.history-short', level: part < SHORT_ERROR ? 'error' : 'warn', message: `the history is ${Math.floor(part * 100)} % as long as it should be` }]
}
