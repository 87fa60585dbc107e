import { FrameBuilder } from '../../core/record/index.ts'
import type { Compressor, FrameParts, FrameSeal } from '../../core/record/index.ts'

/** What a sealing thread is given. */
export type SealingJob = { seal: FrameSeal; parts: FrameParts }
/** What it gives back. Without `payload` the stored payload is the slab itself. */
export type SealingAnswer = { head: Uint8Array; payload?: Uint8Array; parts: FrameParts }

/** Node's buffers of that size and more share their memory with no other. */
const LONE_BYTES = 32 * 1024

/** One job as the thread does it. Pure but for the compressor's memory of what paid. */
export const sealParts = (seal: FrameSeal, given: FrameParts, compressor: Compressor): { answer: SealingAnswer; transfer: ArrayBuffer[] } => {
  const builder = new FrameBuilder(given)
  const { head, payload, keepsSlab } = builder.seal(seal, compressor)
  const parts = builder.give()
  const transfer = [parts.payload.buffer as ArrayBuffer, parts.table.buffer as ArrayBuffer]
  if (keepsSlab) return { answer: { head, parts }, transfer }
  // Small buffers may lie in a pool that others share: those are copied.
  if (payload.length >= LONE_BYTES) transfer.push(payload.buffer as ArrayBuffer)
  return { answer: { head, payload, parts }, transfer }
}
