// The Network Block Device protocol, both sides: fixed newstyle handshake, simple and structured replies, block status. After the NBD
// project's doc/proto.md; names are those of the specification.
// NbdServer serves NbdExports (agent: recovery points; tests), NbdClient reads from QEMU's exports (plugin: sync) and tests targets. Both are
// thin sockets around parsers without I/O, which are public too: plugin/capture runs its own loop over ServerHandshake, RequestParser and
// the reply encoder, because a guest waits for it.
// 64-bit numbers are checked to be below 2^53 at the edge; lengths are checked against caps before memory is taken; the other side is never
// trusted: what breaks the protocol ends its connection with CdpError NBD_PROTOCOL and nothing else.
// This folder never reconnects, never retries, never logs, speaks no TLS, and knows nothing of journals.
export * from './constants.ts'
export { describeAddress, transmissionFlagsOf } from './export.ts'
export type { BlockSize, Extent, NbdAddress, NbdExport } from './export.ts'
export { MemoryExport } from './memory-export.ts'
export { NbdRequestError, nbdErrorName, toNbdErrno } from './nbd-errno.ts'
export { ServerHandshake } from './server-handshake.ts'
export type { HandshakeEvent, HandshakeExport, HandshakeOptions, HandshakeOutcome, HandshakeStep, NegotiatedSession } from './server-handshake.ts'
export { RequestParser } from './request-parser.ts'
export type { RequestSink } from './request-parser.ts'
export {
  blockStatusBytes,
  errorChunkBytes,
  NONE_CHUNK_BYTES,
  OFFSET_DATA_HEADER_BYTES,
  OFFSET_HOLE_BYTES,
  writeBlockStatus,
  writeErrorChunk,
  writeNoneChunk,
  writeOffsetDataHeader,
  writeOffsetHole,
  writeSimpleReply,
} from './reply-encoder.ts'
export { NbdServer } from './server.ts'
export type { NbdServerCounters, NbdServerOptions } from './server.ts'
export type { ConnectionLimits } from './server-connection.ts'
export { checkHandshake, NbdClient } from './client.ts'
export type { NbdClientOptions } from './client.ts'
export type { ByteRange } from './client-requests.ts'
export { ClientHandshake } from './client-handshake.ts'
export type { ClientHandshakeOptions, ClientHandshakeStep, ClientSession } from './client-handshake.ts'
export { ReplyParser } from './reply-parser.ts'
export type { ReplySink } from './reply-parser.ts'
