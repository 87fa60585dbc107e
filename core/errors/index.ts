// The one error class of the project. Whoever can say what an operator should do next throws a CdpError; the CLI and the APIs
// print message and hint, daemons log code and context. Expected outcomes are return values, not errors.
// This folder never logs and never exits.
export { CdpError, errorCode, errorMessage, toCdpError } from './cdp-error.ts'
export type { ErrorCode, CdpErrorOptions } from './cdp-error.ts'
export { errorCodes } from './codes.ts'
