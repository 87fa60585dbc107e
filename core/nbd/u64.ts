import { CdpError } from '../errors/index.ts'

const TWO_TO_32 = 0x1_0000_0000
const MAX_HIGH = 0x1f_ffff

/** Two halves of a u64 as one number. @throws CdpError NBD_PROTOCOL at 2^53 and above. */
export const joinU64 = (high: number, low: number): number => {
  if (high > MAX_HIGH) throw new CdpError('NBD_PROTOCOL', 'A 64-bit number of the NBD peer is 2^53 or larger.', { context: { high, low } })
  return high * TWO_TO_32 + low
}

/** @throws CdpError NBD_PROTOCOL at 2^53 and above. */
export const readU64 = (source: Buffer, at: number): number => joinU64(source.readUInt32BE(at), source.readUInt32BE(at + 4))

/** @param value an integer in 0 .. 2^53 - 1 */
export const writeU64 = (target: Buffer, value: number, at: number): void => {
  target.writeUInt32BE(Math.floor(value / TWO_TO_32), at)
  target.writeUInt32BE(value % TWO_TO_32, at + 4)
}
