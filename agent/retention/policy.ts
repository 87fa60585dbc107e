import { CdpError } from '../../core/errors/index.ts'

/** From this age on one checkpoint in each stretch of `everyMs` stays. */
export type ThinningLevel = { afterMs: number; everyMs: number }

/**
 * What becomes of a sync that would not fit the limit of a journal: grow beyond it, up to the hard stop; pause, which keeps all history and takes nothing more; or
 * give history up early, down to the last checkpoint before the sync, which is tagged.
 */
export const SYNC_OVERFLOWS = ['grow', 'pause', 'give-up'] as const
export type SyncOverflow = (typeof SYNC_OVERFLOWS)[number]

/** What an operator asks for. Limits are for the journal of one VM; undefined: none. */
export type RetentionPolicy = {
  /** 1 h to 30 d. */
  historyMs: number
  thinning: readonly ThinningLevel[]
  /** Above it history gets shorter than `historyMs`. */
  journalLimitBytes: number | undefined
  warnBytes: number | undefined
  /** While pins or a sync hold the base the limit may be passed up to here; then the VM's journal takes nothing more. */
  hardStopBytes: number | undefined
  promotionBytesPerSec: number
  syncOverflow: SyncOverflow
}

export const HOUR_MS = 3_600_000
export const DAY_MS = 24 * HOUR_MS
/** Of the limit: above the first the oldest checkpoints are promoted, until it is below the second. */
export const LIMIT_BEGIN = 0.95
export const LIMIT_GOAL = 0.9
/** Of the configured time. */
export const SHORT_WARNING = 0.85
export const SHORT_ERROR = 0.75
/** Free space is not worth the last part of a history: so much of it is never given up for the reserve. */
export const KEEP_FOR_RESERVE = 0.05

/** What must stay free on a file system of that size: given, or the smaller of 30 GB and 15 %. */
export const reserveOf = (totalBytes: number, asked: { reserveBytes?: number | undefined; reservePercent?: number | undefined }): number =>
  Math.floor(asked.reserveBytes ?? (asked.reservePercent === undefined ? Math.min(30e9, totalBytes * 0.15) : (totalBytes * asked.reservePercent) / 100))

/** @throws CdpError BAD_INPUT for what contradicts itself */
export const checkPolicy = (policy: RetentionPolicy): RetentionPolicy => {
  const bad = (message: string, hint: string): CdpError => new CdpError('BAD_INPUT', `retention: ${message}`, { hint })
  const { historyMs, thinning, journalLimitBytes, warnBytes, hardStopBytes } = policy
  if (historyMs < HOUR_MS || historyMs > 30 * DAY_MS) throw bad(`a history of ${historyMs} ms is not possible`, 'Choose between 1 h and 30 d.')
  thinning.forEach(({ afterMs, everyMs }, at) => {
    const before = at === 0 ? undefined : thinning[at - 1]
    if (before !== undefined && (afterMs <= before.afterMs || everyMs <= before.everyMs || everyMs % before.everyMs !== 0)) {
      throw bad('thinning levels must get older and coarser, each a multiple of the one before', 'For example one a minute after 24 h, one an hour after 7 d.')
    }
  })
  if (journalLimitBytes !== undefined && hardStopBytes !== undefined && hardStopBytes < journalLimitBytes) throw bad('the hard stop is below the limit', 'Give hardStopBytes at least journalLimitBytes.')
  if (journalLimitBytes !== undefined && warnBytes !== undefined && warnBytes > journalLimitBytes) throw bad('the warning is above the limit', 'Give warnBytes at most journalLimitBytes.')
  return policy
}

type Asked = { historyMs: number; thinning: readonly ThinningLevel[]; journalLimitBytes?: number | undefined; warnBytes?: number | undefined; hardStopBytes?: number | undefined; promotionBytesPerSec: number; syncOverflow?: SyncOverflow }

/** The policy of one VPG: what is configured for all, what differs for it, and what follows from the limit. @throws CdpError BAD_INPUT */
export const policyFrom = (asked: Asked, own: Partial<Asked> = {}): RetentionPolicy => {
  const { historyMs, thinning, journalLimitBytes, warnBytes, hardStopBytes, promotionBytesPerSec, syncOverflow = 'grow' } = { ...asked, ...own }
  return checkPolicy({
    historyMs, thinning, journalLimitBytes, promotionBytesPerSec, syncOverflow,
    warnBytes: warnBytes ?? (journalLimitBytes === undefined ? undefined : journalLimitBytes * 0.75),
    hardStopBytes: hardStopBytes ?? (journalLimitBytes === undefined ? undefined : journalLimitBytes * 1.5),
  })
}
