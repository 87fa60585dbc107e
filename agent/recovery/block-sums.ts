import { crc32c } from '@node-rs/crc32'
import { CdpError } from '../../core/errors/index.ts'

const BLOCK_BYTES = 4096

/** Checksums of a stored payload's blocks, taken when the frame was checked as a whole, and where the payload stands in its file. */
export type PayloadSums = { payloadAtBytes: number; payloadBytes: number; sums: Uint32Array }

/** A slice of blocks around [payloadOffset, + lengthBytes). */
export const blocksAround = (known: PayloadSums, payloadOffset: number, lengthBytes: number): { startBytes: number; endBytes: number } => ({
  startBytes: payloadOffset - (payloadOffset % BLOCK_BYTES),
  endBytes: Math.min(known.payloadBytes, Math.ceil((payloadOffset + lengthBytes) / BLOCK_BYTES) * BLOCK_BYTES),
})

export const sumBlocks = (payload: Buffer, payloadAtBytes: number): PayloadSums => {
  const sums = new Uint32Array(Math.ceil(payload.length / BLOCK_BYTES))
  for (let block = 0; block < sums.length; block++) sums[block] = crc32c(payload.subarray(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES))
  return { payloadAtBytes, payloadBytes: payload.length, sums }
}

/** @throws CdpError CHECKSUM if `blocks`, read at `startBytes` of the payload, are not what they were */
export const verifyBlocks = (known: PayloadSums, blocks: Buffer, startBytes: number): void => {
  const first = startBytes / BLOCK_BYTES
  for (let at = 0; at * BLOCK_BYTES < blocks.length; at++) {
    if (crc32c(blocks.subarray(at * BLOCK_BYTES, (at + 1) * BLOCK_BYTES)) !== known.sums[first + at]) {
      throw new CdpError('CHECKSUM', 'frame payload changed since it was checked')
    }
  }
}
