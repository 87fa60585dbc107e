import { constants, zstdCompressSync } from 'node:zlib'
import type { Compressor } from './frame-builder.ts'

const MIN_BYTES = 2048
const WORTH = 0.8
const MAX_SKIPPED = 64

/**
 * zstd level 1 where it pays. After a payload that saved less than a fifth the next 1, 2, 4 ... 64 payloads are stored
 * without a try, so that data that do not compress cost next to nothing.
 */
export const adaptiveZstd = (): Compressor => {
  const options = { params: { [constants.ZSTD_c_compressionLevel]: 1 } }
  let penalty = 0
  let skip = 0
  return (raw) => {
    if (raw.length < MIN_BYTES) return undefined
    if (skip > 0) {
      skip--
      return undefined
    }
    const compressed = zstdCompressSync(raw, options)
    if (compressed.length < raw.length * WORTH) {
      penalty = 0
      return compressed
    }
    penalty = Math.min(MAX_SKIPPED, Math.max(1, penalty * 2))
    skip = penalty
    return undefined
  }
}
