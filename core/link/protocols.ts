/** ALPN names (RFC 7301). A new wire version gets a new name. */
export const streamProtocol = 'cdp-stream/1'
export const pairProtocol = 'cdp-pair/1'
export const nodeProtocol = 'cdp-node/1'

/** TCP keep-alive begins after this much silence; a dead peer is noticed by the stream's own heartbeats long before. */
export const keepAliveDelayMs = 10_000
