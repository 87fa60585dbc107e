// What both sides of a pairing share: the one-time token that an operator carries, and the two messages (ALPN cdp-pair/1).
//
//   token    cdp1.<base64url of JSON {host, port, caFingerprintSha256, secret}>
//   message  u32 big endian length, then that many bytes of JSON (at most 16 KiB); one request, one answer, then both close
//
// Called by agent/pairing (makes tokens, answers) and plugin/pairing (reads tokens, asks). The token is a secret: whoever holds it
// may pair one site within its life. It belongs on stdin or in a file, never on a command line.
//
// This folder never connects, never stores, never decides who may pair.
export { formatToken, parseToken } from './token.ts'
export type { PairingToken } from './token.ts'
export { PairAnswer, PairRequest } from './messages.ts'
export { receiveMessage, sendMessage } from './wire.ts'
