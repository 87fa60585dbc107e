// The stream between a capture worker and the agent: messages over one secure connection per VM (docs/format.md, Stream).
// Pure code: builds and reads messages. plugin/replicate and agent/ingest own the sockets and the rules of who sends what.
export * from './messages.ts'
export { FrameBuffers } from './frame-buffers.ts'
export { MessageParser } from './parser.ts'
