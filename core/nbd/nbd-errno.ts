import { CdpError, errorCode } from '../errors/index.ts'
import { NBD_EINVAL, NBD_EIO, NBD_ENOMEM, NBD_ENOSPC, NBD_ENOTSUP, NBD_EOVERFLOW, NBD_EPERM, NBD_ESHUTDOWN } from './constants.ts'

const ERRNO_BY_CODE: Readonly<Record<string, number>> = {
  EPERM: NBD_EPERM,
  EACCES: NBD_EPERM,
  EROFS: NBD_EPERM,
  EINVAL: NBD_EINVAL,
  BAD_INPUT: NBD_EINVAL,
  ENOMEM: NBD_ENOMEM,
  ENOSPC: NBD_ENOSPC,
  EDQUOT: NBD_ENOSPC,
  EFBIG: NBD_ENOSPC,
  EOVERFLOW: NBD_EOVERFLOW,
  ENOTSUP: NBD_ENOTSUP,
  EOPNOTSUPP: NBD_ENOTSUP,
  ESHUTDOWN: NBD_ESHUTDOWN,
  ABORTED: NBD_ESHUTDOWN,
  CLOSED: NBD_ESHUTDOWN,
}

const NAMES: Readonly<Record<number, string>> = {
  [NBD_EPERM]: 'EPERM',
  [NBD_EIO]: 'EIO',
  [NBD_ENOMEM]: 'ENOMEM',
  [NBD_EINVAL]: 'EINVAL',
  [NBD_ENOSPC]: 'ENOSPC',
  [NBD_EOVERFLOW]: 'EOVERFLOW',
  [NBD_ENOTSUP]: 'ENOTSUP',
  [NBD_ESHUTDOWN]: 'ESHUTDOWN',
}

/** An NBD error with the text a client of structured replies gets to see. */
export class NbdRequestError extends CdpError {
  readonly errno: number

  constructor(errno: number, message: string) {
    super('NBD_REFUSED', message, { context: { errno: nbdErrorName(errno) } })
    this.errno = errno
  }
}

/** The NBD error value for whatever an export threw; EIO where nothing fits better. */
export const toNbdErrno = (error: unknown): number => {
  if (error instanceof NbdRequestError) return error.errno
  return ERRNO_BY_CODE[errorCode(error) ?? ''] ?? NBD_EIO
}

/** "ENOSPC" for 28; the number itself for one the specification does not name. */
export const nbdErrorName = (errno: number): string => NAMES[errno] ?? String(errno)

/** What a client reports when the server answered a request with an error. */
export const requestRefused = (command: string, errno: number, message: string): CdpError =>
  new CdpError('NBD_REFUSED', `NBD server answered ${command} with ${nbdErrorName(errno)}${message === '' ? '' : `: ${message}`}.`, {
    context: { command, errno: nbdErrorName(errno) },
  })
