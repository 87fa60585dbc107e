import { expect, test } from '@jest/globals'
import { thinOut } from './thin.ts'
import type { ThinEntry } from './thin.ts'

const MINUTE_MS = 60_000
const HOUR_MS = 60 * MINUTE_MS
const entry = (id: string, atUnixMs: number, own: Partial<ThinEntry> = {}): ThinEntry => ({ id, atUnixMs, isTagged: false, isSuspect: false, isHeld: false, ...own })
const idsLeft = (entries: readonly ThinEntry[], everyMs: number): string[] => {
  const gone = new Set(thinOut(entries, everyMs))
  return entries.filter((one) => !gone.has(one)).map(({ id }) => id)
}

test('the oldest of each stretch stays, tagged and held ones too', () => {
  const entries = [entry('a', 0), entry('b', 5000), entry('c', 10_000, { isTagged: true }), entry('d', 59_999, { isHeld: true }), entry('e', 60_000), entry('f', 61_000)]
  expect(idsLeft(entries, MINUTE_MS)).toEqual(['a', 'c', 'd', 'e'])
})

test('a suspect one stands for no stretch', () => {
  expect(idsLeft([entry('a', 0, { isSuspect: true }), entry('b', 1), entry('c', 2)], MINUTE_MS)).toEqual(['b'])
})

test('thinning by minutes first, in any parts, and by hours then is thinning by hours', () => {
  let state = 3
  const random = (below: number): number => (state = (Math.imul(state, 1_103_515_245) + 12_345) & 0x7fff_ffff) % below
  for (let run = 0; run < 50; run++) {
    const all: ThinEntry[] = []
    for (let at = random(HOUR_MS), n = 0; n < 2000; n++) {
      at += random(8) === 0 ? random(20 * MINUTE_MS) : 5000
      all.push(entry(`c${n}`, at, { isTagged: random(50) === 0, isSuspect: random(30) === 0 }))
    }
    let left = all
    for (let end = 0; end < all.length; end += 1 + random(300)) {
      const part = left.filter((one) => one.atUnixMs < Math.floor(all[end].atUnixMs / MINUTE_MS) * MINUTE_MS)
      const gone = new Set(thinOut(part, MINUTE_MS))
      left = left.filter((one) => !gone.has(one))
    }
    expect(idsLeft(left, HOUR_MS)).toEqual(idsLeft(all, HOUR_MS))
  }
})
