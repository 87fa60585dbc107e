// Sends a VM's frames to the agent over one secure connection and hears what is durable there. Runs in the capture worker.
// Frames come from plugin/buffer in order; after a reconnect they are sent again from the first one that is not durable.
// It never builds a record and never decides to let go of a guest. A limit of bandwidth is divided among the VMs by the main thread
// (docs/decisions/bandwidth.md) and kept here.
export { DAYS, divide, limitAt } from './bandwidth.ts'
export type { Bandwidth, BandwidthWindow, Day, Demand } from './bandwidth.ts'
export { RateCell, RateLimit } from './rate-limit.ts'
export { StreamSender } from './stream-sender.ts'
export type { StreamSenderOptions } from './stream-sender.ts'
export { StreamLink } from './stream-link.ts'
export type { StreamLinkOptions } from './stream-link.ts'
