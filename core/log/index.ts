// The log of the daemons: one line per thing that happened, as JSON or for people, on stderr.
//
// main.ts creates one log with createDaemonLog and passes `Logger` to the parts, which add their ids with `child`.
// A level that is off costs one comparison. Secrets are taken out by key and by form before a line is built: tokens,
// passwords, private keys never reach a log, also not inside an error's context or cause.
//
// This folder never decides what is worth a line, never writes files (systemd and the operator's collector do), never throws
// because of a field it cannot print. Nothing is logged per write of a guest.
export { createDaemonLog, loggerTo, logLevels, silentLogger } from './logger.ts'
export type { DaemonLogOptions, LogFields, Logger, LogLevel, LogLine } from './logger.ts'
export { redact } from './redact.ts'
