// The stream between a capture worker and the agent: messages over one secure connection per VM (docs/format.md, Stream).
// Pure code: builds and reads messages. plugin/replicate and agent/ingest own the sockets and the rules of who sends what.
export * from './messages.ts'
export * from './hash-messages.ts'
export { FIRST_GENERATION, generationError, judgeGeneration } from './generation.ts'
export type { GenerationVerdict } from './generation.ts'
export { FrameBuffers } from './frame-buffers.ts'
export { MessageParser } from './parser.ts'
