import { randomInt } from 'node:crypto'

/** Random numbers that a seed repeats (xorshift32). */
export class Random {
  readonly seed: number
  #state: number

  constructor(seed: number) {
    this.seed = seed
    this.#state = (Math.imul(seed, 0x9e37_79b1) ^ 0x5bd1_e995) | 1
  }

  u32(): number {
    let x = this.#state
    x ^= x << 13
    x ^= x >>> 17
    x ^= x << 5
    this.#state = x
    return x >>> 0
  }

  /** An integer in [low, high). */
  int(low: number, high: number): number {
    return low + (this.u32() % (high - low))
  }

  chance(probability: number): boolean {
    return this.u32() < probability * 0x1_0000_0000
  }
}

/** The seed of a test: CDP_SEED, or a fresh one. Tests print it. */
export const testSeed = (): number => Number(process.env.CDP_SEED ?? randomInt(1, 2 ** 31))
