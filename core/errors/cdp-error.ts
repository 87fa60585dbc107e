import type { errorCodes } from './codes.ts'

export type ErrorCode = keyof typeof errorCodes

export type CdpErrorOptions = {
  cause?: unknown
  /** What an operator does next, one sentence. */
  hint?: string
  /** True if the same request may succeed later without anybody changing anything. */
  retry?: boolean
  /** Ids and units, never secrets. */
  context?: Record<string, string | number | boolean | undefined>
}

export class CdpError extends Error {
  readonly code: ErrorCode
  readonly hint: string | undefined
  readonly retry: boolean
  readonly context: Record<string, string | number | boolean | undefined>

  constructor(code: ErrorCode, message: string, options: CdpErrorOptions = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause })
    this.name = 'CdpError'
    this.code = code
    this.hint = options.hint
    this.retry = options.retry ?? false
    this.context = options.context ?? {}
  }

  toJSON(): { code: ErrorCode; message: string; hint?: string; context: Record<string, string | number | boolean | undefined> } {
    return { code: this.code, message: this.message, ...(this.hint === undefined ? {} : { hint: this.hint }), context: this.context }
  }
}

/** `code` of a CdpError or of one of Node's own errors ("ENOENT"), else undefined. */
export const errorCode = (error: unknown): string | undefined =>
  typeof error === 'object' && error !== null && 'code' in error && typeof error.code === 'string' ? error.code : undefined

/** A one-line message of whatever was thrown; of what went wrong first, and then with its end, both. */
export const errorMessage = (error: unknown): string =>
  error instanceof SuppressedError ? `${errorMessage(error.suppressed)}; and then: ${errorMessage(error.error)}` :
  typeof error === 'object' && error !== null && 'message' in error && typeof error.message === 'string' ? error.message : String(error)

/** The error itself if it is a CdpError, else a CdpError around it. */
export const toCdpError = (error: unknown, code: ErrorCode = 'INTERNAL'): CdpError =>
  error instanceof CdpError ? error : new CdpError(code, errorMessage(error), { cause: error })
