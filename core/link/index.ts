// The wire between two sites, and between the nodes of one: TLS 1.3 over one port, protocols told apart by ALPN.
//
//   cdp-stream/1   replication; both sides show a certificate, the peer's identity is the site id in the client certificate's CN
//   cdp-pair/1     pairing; the client has no certificate yet
//   cdp-node/1     node to node in one cluster; both sides show a certificate of the cluster's own authority, the CN is the node's name
//
// The agent's main.ts and plugin/cluster listen (listenSecure), the plugin's capture workers, pairing and plugin/cluster connect
// (connectSecure). A listener speaks only the protocols that it was given a receiver for. What comes out are connected, verified TLSSockets (TCP_NODELAY, keep-alive); what is spoken over them belongs to the receivers.
//
// This folder never speaks on a socket, never retries, never trusts a host name or the system's certificates, and never lets a
// stranger hold more than a bounded number of half-open connections for a bounded time.
export { connectSecure } from './connect.ts'
export type { ConnectOptions } from './connect.ts'
export { listenSecure } from './listen.ts'
export type { LinkCounters, ListenOptions, PeerIdentity, Refusal, SecureListener } from './listen.ts'
export { nodeProtocol, pairProtocol, streamProtocol } from './protocols.ts'
export { readInto } from './read-into.ts'
export type { Reading } from './read-into.ts'
export { readServerChain } from './server-chain.ts'
