// Sends a VM's frames to the agent over one secure connection and hears what is durable there. Runs in the capture worker.
// Frames come from plugin/buffer in order; after a reconnect they are sent again from the first one that is not durable.
// It never builds a record and never decides to let go of a guest.
export { StreamSender } from './stream-sender.ts'
export type { StreamSenderOptions } from './stream-sender.ts'
export { StreamLink } from './stream-link.ts'
export type { StreamLinkOptions } from './stream-link.ts'
