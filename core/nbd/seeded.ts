/** A small seeded generator (mulberry32) for property tests and fuzzing: the same seed gives the same run. @returns integers in 0 .. below - 1 */
export const seededIntegers = (seed: number): ((below: number) => number) => {
  let state = seed >>> 0
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return Math.floor((((mixed ^ (mixed >>> 14)) >>> 0) / 0x1_0000_0000) * below)
  }
}

/** Cuts bytes into chunks of random length, mostly short ones. The chunks are copies, so that a parser that keeps a view is caught. */
export const randomChunks = (bytes: Buffer, below: (limit: number) => number, longestBytes: number): Buffer[] => {
  const chunks: Buffer[] = []
  for (let at = 0; at < bytes.length; ) {
    const stop = Math.min(bytes.length, at + 1 + below(below(3) === 0 ? longestBytes : Math.min(40, longestBytes)))
    chunks.push(Buffer.from(bytes.subarray(at, stop)))
    at = stop
  }
  return chunks
}
