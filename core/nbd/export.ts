import {
  NBD_FLAG_CAN_MULTI_CONN,
  NBD_FLAG_HAS_FLAGS,
  NBD_FLAG_READ_ONLY,
  NBD_FLAG_SEND_FAST_ZERO,
  NBD_FLAG_SEND_FLUSH,
  NBD_FLAG_SEND_FUA,
  NBD_FLAG_SEND_TRIM,
  NBD_FLAG_SEND_WRITE_ZEROES,
} from './constants.ts'

/** A run of bytes with the flags a metadata context gives it; position follows from the extents before it. */
export type Extent = { lengthBytes: number; flags: number }

/**
 * Sizes of requests: offsets and lengths are multiples of minBytes, best around preferredBytes, data at most maxBytes. minBytes and preferredBytes
 * are powers of two.
 */
export type BlockSize = { readonly minBytes: number; readonly preferredBytes: number; readonly maxBytes: number }

/** Where an NBD server listens or is found. */
export type NbdAddress = { path: string } | { host: string; port: number }

/**
 * What a server serves under a name. Operations reject with a CdpError or a Node error; the client sees the matching NBD error and the connection
 * stays. Ranges are inside the export and aligned to blockSize.minBytes when they arrive here; operations overlap freely.
 */
export interface NbdExport {
  readonly name: string
  readonly sizeBytes: number
  readonly readOnly: boolean
  readonly description?: string
  readonly blockSize: BlockSize
  /** True if a flush on one connection covers writes completed on any, and all see the same data. */
  readonly canMultiConn: boolean
  readonly metaContexts: readonly string[]
  /** True if writeZeroes with `fast` rejects at once (code ENOTSUP) where it could not be faster than writing. */
  readonly fastZero?: boolean
  /** True if reads may ask blockStatus('base:allocation') first and send zeroes as holes. Only for contents that do not change. */
  readonly sparseReads?: boolean
  /** Exactly lengthBytes in any number of pieces. The pieces belong to the caller until they are sent. `signal`: the client is gone. */
  read(offsetBytes: number, lengthBytes: number, signal: AbortSignal): Promise<readonly Uint8Array[]>
  /** `data` belongs to the export from now on. */
  write?(offsetBytes: number, data: Buffer, fua: boolean): Promise<void>
  writeZeroes?(offsetBytes: number, lengthBytes: number, how: { mayTrim: boolean; fua: boolean; fast: boolean }): Promise<void>
  trim?(offsetBytes: number, lengthBytes: number, fua: boolean): Promise<void>
  flush?(): Promise<void>
  /** At least one extent from offsetBytes on; may describe less than was asked. */
  blockStatus?(context: string, offsetBytes: number, lengthBytes: number): Promise<readonly Extent[]>
  /** A client entered the transmission phase. */
  opened?(): void
  /** That client is gone and none of its requests is under way any more. */
  closed?(): void
}

/** Transmission flags an export is offered with, but for NBD_FLAG_SEND_DF, which depends on the connection. */
export const transmissionFlagsOf = (served: NbdExport): number => {
  let flags = NBD_FLAG_HAS_FLAGS
  if (served.flush) flags |= NBD_FLAG_SEND_FLUSH
  if (served.canMultiConn) flags |= NBD_FLAG_CAN_MULTI_CONN
  if (served.readOnly) return flags | NBD_FLAG_READ_ONLY
  if (served.write) flags |= NBD_FLAG_SEND_FUA
  if (served.trim) flags |= NBD_FLAG_SEND_TRIM
  if (served.writeZeroes) flags |= NBD_FLAG_SEND_WRITE_ZEROES
  if (served.writeZeroes && served.fastZero) flags |= NBD_FLAG_SEND_FAST_ZERO
  return flags
}

/** "unix:/run/x.sock" or "host:port", for messages. */
export const describeAddress = (address: NbdAddress): string => ('path' in address ? `unix:${address.path}` : `${address.host}:${address.port}`)
