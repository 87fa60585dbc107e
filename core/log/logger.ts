import winston from 'winston'
import { redact } from './redact.ts'

export const logLevels = ['error', 'warn', 'info', 'debug', 'trace'] as const
export type LogLevel = (typeof logLevels)[number]

/** Structured context of a line: ids and units. Values whose key looks like a secret are never written. */
export type LogFields = Record<string, unknown>

/**
 * What daemons and their parts log to. A line costs about 15 us, so nothing is logged per write. A caller that has to build
 * something for a line asks first: `if (log.enabled('debug')) log.debug('frame', { ... })`.
 */
export type Logger = {
  enabled(level: LogLevel): boolean
  error(message: string, fields?: LogFields): void
  warn(message: string, fields?: LogFields): void
  info(message: string, fields?: LogFields): void
  debug(message: string, fields?: LogFields): void
  trace(message: string, fields?: LogFields): void
  /** A logger that adds `fields` to each of its lines. */
  child(fields: LogFields): Logger
}

export type LogLine = { level: LogLevel; atUnixMs: number; message: string; fields: LogFields }

/** A Logger in front of any sink: levels are compared before anything is built, secrets are taken out before the sink sees a line. */
export const loggerTo = (level: LogLevel, sink: (line: LogLine) => void, options: { nowUnixMs?: () => number; fields?: LogFields } = {}): Logger => {
  const threshold = logLevels.indexOf(level)
  const nowUnixMs = options.nowUnixMs ?? Date.now
  const own = options.fields
  const write = (lineLevel: LogLevel, message: string, fields: LogFields | undefined): void => {
    if (logLevels.indexOf(lineLevel) > threshold) return
    sink({
      level: lineLevel,
      atUnixMs: nowUnixMs(),
      message: redact.text(message),
      fields: redact.fields(own === undefined ? (fields ?? {}) : { ...own, ...fields }),
    })
  }
  return {
    enabled: (asked) => logLevels.indexOf(asked) <= threshold,
    error: (message, fields) => write('error', message, fields),
    warn: (message, fields) => write('warn', message, fields),
    info: (message, fields) => write('info', message, fields),
    debug: (message, fields) => write('debug', message, fields),
    trace: (message, fields) => write('trace', message, fields),
    child: (fields) => loggerTo(level, sink, { nowUnixMs, fields: { ...own, ...fields } }),
  }
}

/** A logger that drops everything. */
export const silentLogger: Logger = {
  enabled: () => false,
  error: () => undefined,
  warn: () => undefined,
  info: () => undefined,
  debug: () => undefined,
  trace: () => undefined,
  child: () => silentLogger,
}

export type DaemonLogOptions = {
  level: LogLevel
  /** json: one object a line, for collectors. human: one readable line, for a terminal and the systemd journal. */
  format: 'json' | 'human'
  /** On every line, e.g. { daemon: 'agent' }. */
  fields?: LogFields
  /** Where lines go; stderr if not given. */
  stream?: NodeJS.WritableStream
}

/** The log of a daemon. */
export const createDaemonLog = (options: DaemonLogOptions): Logger => {
  const levels = Object.fromEntries(logLevels.map((name, index) => [name, index]))
  const print = winston.format.printf((info) => info.message as string)
  const root = winston.createLogger({
    levels,
    level: options.level,
    format: print,
    exitOnError: false,
    transports: [
      options.stream === undefined
        ? new winston.transports.Console({ stderrLevels: [...logLevels], forceConsole: false })
        : new winston.transports.Stream({ stream: options.stream, eol: '\n' }),
    ],
  })
  const render = options.format === 'json' ? jsonLine : humanLine
  return loggerTo(options.level, (line) => root.log(line.level, render(line)), options.fields === undefined ? {} : { fields: options.fields })
}

export const jsonLine = (line: LogLine): string =>
  JSON.stringify({ at: new Date(line.atUnixMs).toISOString(), level: line.level, message: line.message, ...line.fields })

export const humanLine = (line: LogLine): string => {
  const parts = Object.entries(line.fields).map(
    ([key, value]) => `${key}=${typeof value === 'string' && /^[^\s"=]+$/.test(value) ? value : JSON.stringify(value)}`,
  )
  const message = line.message.replaceAll(/[\r\n]+/g, ' ')
  return `${new Date(line.atUnixMs).toISOString()} ${line.level.padEnd(5)} ${message}${parts.length === 0 ? '' : ` ${parts.join(' ')}`}`
}
