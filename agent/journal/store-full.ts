import { CdpError, errorCode } from '../../core/errors/index.ts'

/** SQLite's own word for a full disk. */
const SQLITE_FULL = 13

/** No room: on the file system (whoever met it), or within the limit of this VM. */
export const isFull = (error: unknown): boolean => {
  const code = errorCode(error)
  const isSqliteFull = typeof error === 'object' && error !== null && 'errcode' in error && error.errcode === SQLITE_FULL
  return isSqliteFull || code === 'ENOSPC' || code === 'EDQUOT' || (error instanceof CdpError && error.context.condition === 'full')
}

export const storeFull = (vm: string, cause: unknown): CdpError =>
  cause instanceof CdpError && cause.context.condition === 'full' ? cause : new CdpError('IO', 'the file system of the journal is full', {
    cause,
    retry: true,
    hint: 'Give the recovery site more space or shorten the history; replication goes on by itself when there is room.',
    context: { vm, condition: 'full' },
  })
