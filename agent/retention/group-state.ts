import { mkdir } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { CdpError, errorCode } from '../../core/errors/index.ts'
import { readJsonFile, writeJsonFile } from '../../core/files/index.ts'
import { newHistoryClock } from './history-clock.ts'
import type { Candidate, HistoryClock } from './history-clock.ts'
import { SYNC_OVERFLOWS } from './policy.ts'
import type { SyncOverflow } from './policy.ts'
import type { MoveReason } from './plan.ts'

export type Target = Candidate & { why: MoveReason }

export type GroupSettings = { syncOverflow?: SyncOverflow }

/**
 * `retention/<site>/<vpg>.json` (docs/format.md, Retention). Losing it loses no history: the next promotion begins where the VMs' own
 * bases stand, and history is kept for longer, because its age is counted anew.
 */
export type GroupState = {
  format: 1
  /** What every VM of the group was promoted to last. */
  oldest?: Target | undefined
  /** What they are being promoted to; from here on nothing below it is offered. */
  intent?: Target | undefined
  clock: HistoryClock
  /** The longest configured history that was reached. */
  filledMs: number
  /** What was chosen for this group while the agent ran, over what is configured. */
  settings?: GroupSettings | undefined
  /** The last checkpoint before a sync that history is given up for, and its name. */
  beforeSync?: { id: string; tag: string } | undefined
  /** History was cut short since it was last as long as configured. */
  shortenedBy?: 'size' | 'reserve' | undefined
}

export const newGroupState = (): GroupState => ({ format: 1, clock: newHistoryClock(), filledMs: 0 })

export const groupStatePath = (directory: string, siteId: string, vpg: string): string => join(directory, encodeURIComponent(siteId), `${encodeURIComponent(vpg)}.json`)

const isObject = (value: unknown): value is Record<string, unknown> => typeof value === 'object' && value !== null && !Array.isArray(value)
const isCandidate = (value: unknown): boolean =>
  isObject(value) && typeof value.id === 'string' && Number.isSafeInteger(value.atUnixMs) && isObject(value.seqs) && Object.values(value.seqs).every(Number.isSafeInteger)
const isSettings = (value: unknown): boolean => isObject(value) && (value.syncOverflow === undefined || SYNC_OVERFLOWS.includes(value.syncOverflow as SyncOverflow))
const isNamed = (value: unknown): boolean => isObject(value) && typeof value.id === 'string' && typeof value.tag === 'string'
const isMissingOr = (check: (value: unknown) => boolean, value: unknown): boolean => value === undefined || check(value)

/** The state in a file, a new one if there is none. @throws CdpError FORMAT */
export const loadGroupState = async (path: string): Promise<GroupState> => {
  const json = await readJsonFile(path)
  if (json === undefined) return newGroupState()
  const isWhole =
    isObject(json) && json.format === 1 && isObject(json.clock) && typeof json.clock.livedMs === 'number' && Array.isArray(json.clock.samples) &&
    json.clock.samples.every((sample: unknown) => isCandidate(sample) && isObject(sample) && typeof sample.livedMs === 'number') &&
    typeof json.filledMs === 'number' && isMissingOr(isSettings, json.settings) && isMissingOr(isNamed, json.beforeSync) && isMissingOr(isCandidate, json.oldest) && isMissingOr(isCandidate, json.intent)
  if (!isWhole) throw new CdpError('FORMAT', `${path} is not the state of a group's retention`, { hint: 'Remove it: history is then kept for longer, and nothing is lost.' })
  return json as GroupState
}

/** Makes the state durable. @throws Node's error */
export const saveGroupState = async (path: string, state: GroupState): Promise<void> => {
  try {
    await writeJsonFile(path, state)
  } catch (error) {
    if (errorCode(error) !== 'ENOENT') throw error
    await mkdir(dirname(path), { recursive: true, mode: 0o700 })
    await writeJsonFile(path, state)
  }
}
