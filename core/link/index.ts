// The wire between two sites: TLS 1.3 over one port, two protocols told apart by ALPN.
//
//   cdp-stream/1   replication; both sides show a certificate, the peer's identity is the site id in the client certificate's CN
//   cdp-pair/1     pairing; the client has no certificate yet
//
// The agent's main.ts listens (listenSecure), the plugin's capture workers and pairing connect (connectSecure). What comes out
// are connected, verified TLSSockets (TCP_NODELAY, keep-alive); what is spoken over them belongs to the receivers.
//
// This folder never speaks on a socket, never retries, never trusts a host name or the system's certificates, and never lets a
// stranger hold more than a bounded number of half-open connections for a bounded time.
export { connectSecure } from './connect.ts'
export type { ConnectOptions } from './connect.ts'
export { listenSecure } from './listen.ts'
export type { LinkCounters, ListenOptions, PeerIdentity, Refusal, SecureListener } from './listen.ts'
export { pairProtocol, streamProtocol } from './protocols.ts'
export { readServerChain } from './server-chain.ts'
