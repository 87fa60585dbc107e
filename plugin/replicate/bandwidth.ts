/** A time of the week with a limit of its own. `from` and `to`: "HH:MM" in local time; a window whose end is not after its begin goes over midnight and belongs to the day it begins on. */
export type BandwidthWindow = { days: readonly Day[]; from: string; to: string; bytesPerSec: number }
/** 0 means no limit, everywhere. */
export type Bandwidth = { bytesPerSec: number; windows: readonly BandwidthWindow[] }

export const DAYS = ['sun', 'mon', 'tue', 'wed', 'thu', 'fri', 'sat'] as const
export type Day = (typeof DAYS)[number]

/** What a VM may take part with: how much it could use, and its weight against others. */
export type Demand = { weight: number; bytesPerSec: number }

/** Share of an equal division that everybody has, however little he needs: the first frames of a burst do not wait for the next division. */
const FLOOR_SHARE = 1 / 16

const minutesOf = (clock: string): number => Number(clock.slice(0, 2)) * 60 + Number(clock.slice(3, 5))

const holds = ({ days, from, to }: BandwidthWindow, day: number, minutes: number): boolean => {
  const [begin, end] = [minutesOf(from), minutesOf(to)]
  const on = (which: number): boolean => days.includes(DAYS[(which + 7) % 7])
  if (begin < end) return on(day) && minutes >= begin && minutes < end
  return (on(day) && minutes >= begin) || (on(day - 1) && minutes < end)
}

/** The limit at a moment, in the local time of the process. 0: none. */
export const limitAt = ({ bytesPerSec, windows }: Bandwidth, at: Date): number => {
  const minutes = at.getHours() * 60 + at.getMinutes()
  return (windows.find((window) => holds(window, at.getDay(), minutes)) ?? { bytesPerSec }).bytesPerSec
}

/**
 * Divides a limit (bytes/s, above 0) by weighted max-min: nobody gets more than he needs, but for a small floor, as long as another could use it; what is over when all have
 * what they need is divided by weight. The sum is the limit.
 */
export const divide = (limitBytesPerSec: number, demands: readonly Demand[]): number[] => {
  const floor = (limitBytesPerSec / demands.length) * FLOOR_SHARE
  const shares = demands.map(() => floor)
  let left = limitBytesPerSec - floor * demands.length
  let open = demands.map((demand, at) => ({ at, weight: demand.weight, wants: Math.max(0, demand.bytesPerSec - floor) })).filter(({ wants }) => wants > 0)
  while (open.length > 0) {
    const weights = open.reduce((sum, { weight }) => sum + weight, 0)
    const perWeight = left / weights
    const content = open.filter(({ weight, wants }) => wants <= weight * perWeight)
    if (content.length === 0) {
      for (const { at, weight } of open) shares[at] += weight * perWeight
      return shares
    }
    for (const { at, wants } of content) {
      shares[at] += wants
      left -= wants
    }
    open = open.filter((one) => !content.includes(one))
  }
  const weights = demands.reduce((sum, { weight }) => sum + weight, 0)
  return shares.map((share, at) => share + (left * demands[at].weight) / weights)
}
