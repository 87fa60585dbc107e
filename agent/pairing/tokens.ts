import { createHash, randomBytes, timingSafeEqual } from 'node:crypto'
import { join } from 'node:path'
import { Type } from '@sinclair/typebox'
import type { Static } from '@sinclair/typebox'
import { Value } from '@sinclair/typebox/value'
import { CdpError } from '../../core/errors/index.ts'
import { ensurePrivateDirectory, readPrivateFile, writePrivateFile } from '../../core/pki/index.ts'

const StoredToken = Type.Object({
  secretSha256: Type.String({ pattern: '^[0-9a-f]{64}$' }),
  expiresAtUnixMs: Type.Number(),
  state: Type.Union([Type.Literal('open'), Type.Literal('used'), Type.Literal('void')]),
  wrongTries: Type.Integer({ minimum: 0 }),
})
const StoredTokens = Type.Object({ version: Type.Literal(1), tokens: Type.Array(StoredToken, { maxItems: 64 }) })
type StoredToken = Static<typeof StoredToken>

const maxOpenTokens = 16
const maxWrongTries = 10
/** Spent tokens are remembered for a day, so that whoever comes with one learns why it does not work. */
const rememberedForMs = 86_400_000

export type Redemption = 'accepted' | 'unknown' | 'expired' | 'used' | 'void'

/** The one-time secrets of `<directory>/pairing-tokens.json`: hashes only; every change is durable before it is acted on. */
export class TokenBook {
  readonly #path: string
  readonly #nowUnixMs: () => number
  /** The file could not be read when the book was opened: tokens that were open are void. */
  readonly wasDamaged: boolean
  #tokens: StoredToken[]
  #tail: Promise<unknown> = Promise.resolve()

  private constructor(path: string, tokens: StoredToken[] | undefined, nowUnixMs: () => number) {
    this.#path = path
    this.#tokens = tokens ?? []
    this.wasDamaged = tokens === undefined
    this.#nowUnixMs = nowUnixMs
  }

  static async open(directory: string, nowUnixMs: () => number): Promise<TokenBook> {
    await ensurePrivateDirectory(directory)
    const path = join(directory, 'pairing-tokens.json')
    const text = await readPrivateFile(path)
    if (text === undefined) return new TokenBook(path, [], nowUnixMs)
    let stored: unknown
    try {
      stored = JSON.parse(text)
    } catch {
      stored = undefined
    }
    // Open tokens live for minutes: with a damaged book they are all void, and the operator makes a new one.
    return new TokenBook(path, Value.Check(StoredTokens, stored) ? stored.tokens : undefined, nowUnixMs)
  }

  /** A new secret (32 random bytes, base64url). Throws CONFLICT when too many are open. */
  create(validForMs: number): Promise<{ secret: string; expiresAtUnixMs: number }> {
    return this.#alone(async () => {
      this.#forget()
      const nowUnixMs = this.#nowUnixMs()
      if (this.#tokens.filter((token) => token.state === 'open' && token.expiresAtUnixMs > nowUnixMs).length >= maxOpenTokens) {
        throw new CdpError('CONFLICT', `${maxOpenTokens} pairing tokens are open already`, { hint: 'Use one of them, or wait until they expire (15 minutes).' })
      }
      const secret = randomBytes(32).toString('base64url')
      const expiresAtUnixMs = nowUnixMs + validForMs
      await this.#store([...this.#tokens, { secretSha256: hash(secret).toString('hex'), expiresAtUnixMs, state: 'open', wrongTries: 0 }])
      return { secret, expiresAtUnixMs }
    })
  }

  /** Spends a secret. A wrong one counts against every open token; the tenth makes them void. */
  redeem(secret: string): Promise<Redemption> {
    return this.#alone(async () => {
      const nowUnixMs = this.#nowUnixMs()
      const presented = hash(secret)
      // Compared with every stored hash, in constant time each: neither the place nor the number of equal bytes shows.
      let found = -1
      this.#tokens.forEach((token, index) => {
        if (timingSafeEqual(presented, Buffer.from(token.secretSha256, 'hex'))) found = index
      })
      const match = this.#tokens[found]
      if (match === undefined) {
        await this.#store(
          this.#tokens.map((token) =>
            token.state !== 'open'
              ? token
              : { ...token, wrongTries: token.wrongTries + 1, state: token.wrongTries + 1 >= maxWrongTries ? ('void' as const) : token.state },
          ),
        )
        return 'unknown'
      }
      if (match.state !== 'open') return match.state
      if (match.expiresAtUnixMs <= nowUnixMs) return 'expired'
      await this.#store(this.#tokens.with(found, { ...match, state: 'used' }))
      return 'accepted'
    })
  }

  #forget(): void {
    const nowUnixMs = this.#nowUnixMs()
    this.#tokens = this.#tokens.filter((token) => token.expiresAtUnixMs + rememberedForMs > nowUnixMs).slice(-48)
  }

  async #store(tokens: StoredToken[]): Promise<void> {
    await writePrivateFile(this.#path, `${JSON.stringify({ version: 1, tokens })}\n`)
    this.#tokens = tokens
  }

  #alone<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#tail.then(work)
    this.#tail = result.then(
      () => undefined,
      () => undefined,
    )
    return result
  }
}

const hash = (secret: string): Buffer => createHash('sha256').update(secret).digest()
