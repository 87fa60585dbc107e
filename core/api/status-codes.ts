import type { ErrorCode } from '../errors/index.ts'

const statuses: Partial<Record<ErrorCode, number>> = {
  BAD_INPUT: 400,
  UNAUTHORIZED: 403,
  NOT_FOUND: 404,
  CONFLICT: 409,
  NOT_PAIRED: 409,
  STALE_EPOCH: 409,
  QEMU_TOO_OLD: 409,
  PAIRING: 422,
  CHECKSUM: 422,
  JOURNAL_DAMAGED: 422,
  CAPTURE_ATTACH: 502,
  QMP_COMMAND: 502,
  QMP_PROTOCOL: 502,
  NBD_PROTOCOL: 502,
  NBD_REFUSED: 502,
  STREAM_PROTOCOL: 502,
  STREAM_REFUSED: 502,
  UNREACHABLE: 503,
  CLOSED: 503,
  ABORTED: 503,
  TIMEOUT: 504,
}

/** The HTTP status of an error code; what is not named is a 500. Clients go by the code, not by this. */
export const httpStatusOf = (code: ErrorCode): number => statuses[code] ?? 500
