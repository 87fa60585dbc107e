import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { PairedSites } from './sites.ts'
import { TokenBook } from './tokens.ts'

let directory: string
let nowUnixMs: number
beforeEach(async () => {
  directory = await mkdtemp('/tmp/cdp-desk-')
  nowUnixMs = 1_700_000_000_000
})
afterEach(() => rm(directory, { recursive: true, force: true }))
const book = (): Promise<TokenBook> => TokenBook.open(directory, () => nowUnixMs)

describe('TokenBook', () => {
  test('what happened to a token is known after a restart', async () => {
    const first = await book()
    const [used, open] = [await first.create(60_000), await first.create(60_000)]
    expect(await first.redeem(used.secret)).toBe('accepted')
    const second = await book()
    expect(await second.redeem(used.secret)).toBe('used')
    expect(await second.redeem(open.secret)).toBe('accepted')
    expect(await readFile(join(directory, 'pairing-tokens.json'), 'utf8')).not.toContain(open.secret)
  })

  test('two redemptions of one secret at the same moment: one is accepted', async () => {
    const tokens = await book()
    const { secret } = await tokens.create(60_000)
    expect((await Promise.all([tokens.redeem(secret), tokens.redeem(secret), tokens.redeem(secret)])).sort()).toEqual(['accepted', 'used', 'used'])
  })

  test('open tokens are bounded; expired ones make room and are forgotten after a day', async () => {
    const tokens = await book()
    const { secret } = await tokens.create(60_000)
    for (let more = 1; more < 16; more += 1) await tokens.create(60_000)
    await expect(tokens.create(60_000)).rejects.toMatchObject({ code: 'CONFLICT' })
    nowUnixMs += 60_000
    await tokens.create(60_000)
    expect(await tokens.redeem(secret)).toBe('expired')
    nowUnixMs += 2 * 86_400_000
    await tokens.create(60_000)
    expect(await tokens.redeem(secret)).toBe('unknown')
  })

  test('the tenth wrong secret makes the open tokens void, also counted over a restart', async () => {
    const { secret } = await (await book()).create(60_000)
    for (let tries = 0; tries < 10; tries += 1) expect(await (await book()).redeem(`wrong ${tries}`)).toBe('unknown')
    expect(await (await book()).redeem(secret)).toBe('void')
  })

  test('a damaged file voids what was open, and is told', async () => {
    const { secret } = await (await book()).create(60_000)
    await writeFile(join(directory, 'pairing-tokens.json'), '{"version":1,"tok')
    const again = await book()
    expect(again.wasDamaged).toBe(true)
    expect(await again.redeem(secret)).toBe('unknown')
    await again.create(60_000)
    expect((await book()).wasDamaged).toBe(false)
  })
})

describe('PairedSites', () => {
  const siteId = '01234567-89ab-cdef-0123-456789abcdef'
  const site = { siteId, fingerprintSha256: 'a'.repeat(64), pairedAtUnixMs: 1, pairedFromAddress: '192.0.2.1', certificateEndsAtUnixMs: 2 }

  test('a site is kept over a restart, replaced, removed', async () => {
    const sites = await PairedSites.open(directory)
    expect(await sites.record(site)).toBe(false)
    const again = await PairedSites.open(directory)
    expect(again.list()).toEqual([site])
    expect(again.admit(site)).toBeUndefined()
    expect(await again.record({ ...site, fingerprintSha256: 'b'.repeat(64) })).toBe(true)
    expect(again.admit(site)).toContain('replaced')
    expect(await again.remove(siteId)).toBe(true)
    expect(await again.remove(siteId)).toBe(false)
    expect((await PairedSites.open(directory)).list()).toEqual([])
  })

  test('a damaged entry is an error, never a site less', async () => {
    await (await PairedSites.open(directory)).record(site)
    const path = join(directory, 'sites', `${siteId}.json`)
    for (const text of ['', '{', JSON.stringify({ ...site, siteId: siteId.replace('0', '1') })]) {
      await writeFile(path, text)
      await expect(PairedSites.open(directory)).rejects.toMatchObject({ code: 'IO' })
    }
  })
})
