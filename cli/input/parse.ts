import { UsageError } from './usage-error.ts'

// What operators type, checked before anything is sent. Each throws UsageError.

const unitMs: Record<string, number> = { ms: 1, s: 1000, m: 60_000, min: 60_000, h: 3_600_000, d: 86_400_000 }

/** "500ms", "5s", "1.5m", "2h", "1d" -> milliseconds. A bare number is seconds. */
export const parseDuration = (text: string): number => {
  const match = /^(\d+(?:\.\d+)?)\s*(ms|s|m|min|h|d)?$/.exec(text.trim())
  const ms = match === null ? Number.NaN : Number(match[1]) * (unitMs[match[2] ?? 's'] ?? Number.NaN)
  if (!Number.isFinite(ms)) throw new UsageError(`"${text}" is not a duration`, 'Write a number and ms, s, m, h or d, for example 5s.')
  return Math.round(ms)
}

export const parseCheckpointInterval = (text: string): number => {
  const ms = parseDuration(text)
  if (ms < 1000 || ms > 3_600_000) throw new UsageError(`checkpoints every ${text} are not possible`, 'Choose between 1s and 1h; 5s is the default.')
  return ms
}

export const parseHoldTime = (text: string): number => {
  const ms = parseDuration(text)
  if (ms < 1000 || ms > 86_400_000) throw new UsageError(`capture cannot be suspended for ${text}`, 'Choose between 1s and 1d; 10m is the default.')
  return ms
}

export const parseOwner = (text: string): string => {
  if (!/^[A-Za-z0-9][A-Za-z0-9._:@/-]{0,127}$/.test(text))
    throw new UsageError(`"${text}" cannot be an owner`, 'Use up to 128 letters, digits and ._:@/-, beginning with a letter or digit.')
  return text
}

export const parseReason = (text: string): string => {
  const reason = text.trim()
  if (reason === '' || reason.length > 200 || /\p{Cc}/u.test(reason)) throw new UsageError('a reason has 1 to 200 characters on one line', 'For example: --reason "resize of scsi0"')
  return reason
}

export const parseVmIds = (texts: string[]): number[] => {
  const ids = texts
    .flatMap((text) => text.split(','))
    .map((text) => {
      if (!/^[1-9]\d{2,8}$/.test(text)) throw new UsageError(`"${text}" is not a VM id`, 'VM ids are numbers from 100 on, as "qm list" shows them.')
      return Number(text)
    })
  const twice = ids.find((id, index) => ids.indexOf(id) !== index)
  if (twice !== undefined) throw new UsageError(`VM ${twice} is named twice`, 'Name each VM once.')
  return ids
}

export const parseVpgName = (text: string): string => {
  if (!/^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$/.test(text))
    throw new UsageError(
      `"${text}" cannot be the name of a VPG`,
      'Use up to 63 letters, digits, dots, dashes and underscores, beginning with a letter or digit.',
    )
  return text
}

export const parsePort = (text: string): number => {
  const port = /^\d{1,5}$/.test(text) ? Number(text) : 0
  if (port < 1 || port > 65_535) throw new UsageError(`"${text}" is not a port`, 'Ports are numbers from 1 to 65535.')
  return port
}

export const parseHost = (text: string): string => {
  if (!/^[A-Za-z0-9._:%-]{1,253}$/.test(text))
    throw new UsageError(`"${text}" is not a host`, 'Give the name or the IP address under which the protected site reaches this one.')
  return text
}

export const parseLimit = (text: string): number => {
  const limit = /^\d{1,5}$/.test(text) ? Number(text) : 0
  if (limit < 1 || limit > 10_000) throw new UsageError(`"${text}" is not a limit`, 'Give a number from 1 to 10000.')
  return limit
}

export const parseTag = (text: string): string => {
  const tag = text.trim()
  if (tag === '' || tag.length > 200 || /\p{Cc}/u.test(tag))
    throw new UsageError('the text of a tag has 1 to 200 characters on one line', 'For example: pvecdp checkpoint tag web "before the upgrade"')
  return tag
}

export const parsePointId = (text: string): string => {
  if (!/^[A-Za-z0-9._-]{1,64}$/.test(text)) throw new UsageError(`"${text}" is not the id of a recovery point`, 'See the ids with: pvecdp point list')
  return text
}

/** "latest", "latest-tagged", an id, or a time, which means the newest checkpoint that can be recovered and is not after it. */
export const parseCheckpoint = (text: string, nowUnixMs: number): string | { atUnixMs: number } => {
  if (looksLikeTime(text)) return { atUnixMs: parseTime(text, nowUnixMs) }
  if (!/^[A-Za-z0-9._-]{1,64}$/.test(text))
    throw new UsageError(
      `"${text}" is neither a checkpoint nor a time`,
      'Give an id from "pvecdp checkpoint list", latest, latest-tagged, or a time such as 2026-11-23T07:04:43, 07:04 or 10m-ago.',
    )
  return text
}

const clock = /^(\d{1,2}):(\d{2})(?::(\d{2})(?:\.(\d{1,3}))?)?$/
const calendar = /^(\d{4})-(\d{2})-(\d{2})(?:[T ](\d{2}):(\d{2})(?::(\d{2})(?:\.(\d{1,3}))?)?(Z|[+-]\d{2}:\d{2})?)?$/
const relative = /^(\d+(?:\.\d+)?\s*(?:ms|s|m|min|h|d))[\s-]ago$/
const absolute = /^@(\d{1,16})$/

const looksLikeTime = (text: string): boolean =>
  text === 'now' || text.startsWith('@') || text.includes(':') || /^\d{4}-\d{2}-\d{2}/.test(text) || /ago$/.test(text)

/**
 * A moment in local time unless it carries an offset: "2026-11-23T07:04:43.120+01:00", "2026-11-23 07:04", "2026-11-23",
 * "07:04" (the last time it was that late), "10m-ago", "now", "@1763881483120" (milliseconds since 1970).
 */
export const parseTime = (text: string, nowUnixMs: number): number => {
  const given = text.trim()
  if (given === 'now') return nowUnixMs
  const past = relative.exec(given)
  if (past !== null) return nowUnixMs - parseDuration(past[1] ?? '')
  const exact = absolute.exec(given)
  if (exact !== null) return inRange(Number(exact[1]), text)
  const time = clock.exec(given)
  if (time !== null) return lastTimeAt(time, text, nowUnixMs)
  const date = calendar.exec(given)
  if (date !== null) return calendarTime(date, text)
  throw notATime(text)
}

const notATime = (text: string): UsageError => new UsageError(`"${text}" is not a time`, 'Write it like 2026-11-23T07:04:43, 07:04, 10m-ago or now.')

const inRange = (unixMs: number, text: string): number => {
  if (!(unixMs >= 0 && unixMs <= 8_640_000_000_000_000)) throw notATime(text)
  return unixMs
}

const lastTimeAt = (match: RegExpExecArray, text: string, nowUnixMs: number): number => {
  const [hour, minute, second, millisecond] = [match[1], match[2], match[3] ?? '0', (match[4] ?? '0').padEnd(3, '0')].map(Number) as [
    number,
    number,
    number,
    number,
  ]
  if (hour > 23 || minute > 59 || second > 59) throw notATime(text)
  const date = new Date(nowUnixMs)
  date.setHours(hour, minute, second, millisecond)
  if (date.getTime() > nowUnixMs) date.setDate(date.getDate() - 1)
  return date.getTime()
}

const calendarTime = (match: RegExpExecArray, text: string): number => {
  const [year, month, day, hour, minute, second, millisecond] = [1, 2, 3, 4, 5, 6]
    .map((index) => Number(match[index] ?? '0'))
    .concat(Number((match[7] ?? '0').padEnd(3, '0'))) as [number, number, number, number, number, number, number]
  if (month < 1 || month > 12 || day < 1 || day > new Date(Date.UTC(year, month, 0)).getUTCDate() || hour > 23 || minute > 59 || second > 59)
    throw notATime(text)
  const zone = match[8]
  if (zone === undefined) return inRange(new Date(year, month - 1, day, hour, minute, second, millisecond).getTime(), text)
  const [zoneHour, zoneMinute] = zone === 'Z' ? [0, 0] : [Number(zone.slice(1, 3)), Number(zone.slice(4))]
  if (zoneHour > 23 || zoneMinute > 59) throw notATime(text)
  const offsetMs = (zone.startsWith('-') ? -1 : 1) * (zoneHour * 60 + zoneMinute) * 60_000
  return inRange(Date.UTC(year, month - 1, day, hour, minute, second, millisecond) - offsetMs, text)
}
