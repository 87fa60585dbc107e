// Figures and times as operators read them.

/** 1536 -> "1.5 KiB"; three significant digits at most. */
export const formatBytes = (bytes: number): string => {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB']
  let value = bytes
  let unit = 0
  while (value >= 1023.5 && unit < units.length - 1) {
    value /= 1024
    unit += 1
  }
  return `${compact(value)} ${units[unit]}`
}

/** 3200 -> "3.2 s", 65000 -> "1 min 5 s": the two largest units, the way people say it. */
export const formatDuration = (ms: number): string => {
  if (ms < 1000) return `${Math.round(ms)} ms`
  if (ms < 9950) return `${compact(ms / 1000)} s`
  const seconds = Math.round(ms / 1000)
  if (seconds < 60) return `${seconds} s`
  const steps: [number, string, number, string][] = [
    [86_400, 'd', 3600, 'h'],
    [3600, 'h', 60, 'min'],
    [60, 'min', 1, 's'],
  ]
  for (const [large, largeName, small, smallName] of steps) {
    if (seconds < large) continue
    const rest = Math.floor((seconds % large) / small)
    return rest === 0 ? `${Math.floor(seconds / large)} ${largeName}` : `${Math.floor(seconds / large)} ${largeName} ${rest} ${smallName}`
  }
  return `${seconds} s`
}

/** Latency figures: "85 us", "1.2 ms". */
export const formatMicroseconds = (us: number): string =>
  us < 1000 ? `${Math.round(us)} us` : us < 1_000_000 ? `${compact(us / 1000)} ms` : `${compact(us / 1_000_000)} s`

/** Local time with its offset: "2026-11-23T07:04:43.120+01:00". */
export const formatTime = (unixMs: number, options: { milliseconds?: boolean } = {}): string => {
  const date = new Date(unixMs)
  const two = (value: number): string => String(value).padStart(2, '0')
  const offsetMinutes = -date.getTimezoneOffset()
  const offset = `${offsetMinutes < 0 ? '-' : '+'}${two(Math.floor(Math.abs(offsetMinutes) / 60))}:${two(Math.abs(offsetMinutes) % 60)}`
  const milliseconds = options.milliseconds === true ? `.${String(date.getMilliseconds()).padStart(3, '0')}` : ''
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`
  return `${day}T${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}${milliseconds}${offset}`
}

/** "12 s ago", or "in 3 min" for what lies ahead. */
export const formatAge = (unixMs: number, nowUnixMs: number): string =>
  unixMs > nowUnixMs ? `in ${formatDuration(unixMs - nowUnixMs)}` : `${formatDuration(nowUnixMs - unixMs)} ago`

/** Text of a daemon or of a user without what could steer a terminal. */
export const printable = (text: string): string => text.replaceAll(/\p{C}+/gu, ' ')

const compact = (value: number): string => (value >= 100 || Number.isInteger(value) ? Math.round(value).toString() : value.toFixed(1).replace(/\.0$/, ''))
