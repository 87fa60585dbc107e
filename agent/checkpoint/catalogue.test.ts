import { describe, expect, test } from '@jest/globals'
import type { CheckpointMark } from '../../core/record/index.ts'
import { Catalogue } from './index.ts'

const SITE = 'site-a'
const mark = (id: string, atUnixMs: number, vms: string[] = ['101', '102'], extra: Partial<CheckpointMark> = {}): CheckpointMark => ({ id, vpg: 'shop', vms, atUnixMs, kind: 'automatic', ...extra })

const noteAll = (catalogue: Catalogue, one: CheckpointMark, seq: number, epoch = 1): boolean[] => one.vms.map((vm) => catalogue.noteMark(SITE, vm, epoch, seq, one))
const stateOf = (catalogue: Catalogue, id: string): string | undefined => catalogue.find(SITE, 'shop', id)?.state

describe('Catalogue', () => {
  test('a checkpoint is valid with the last marker of its VMs, once, and names the sequence of each', () => {
    using catalogue = new Catalogue(':memory:')
    const one = mark('c1', 1000, ['101', '102', '103'])
    expect(catalogue.noteMark(SITE, '102', 1, 20, one)).toBe(false)
    expect(catalogue.noteMark(SITE, '102', 1, 20, one)).toBe(false)
    expect(stateOf(catalogue, 'c1')).toBe('pending')
    expect(catalogue.latest(SITE, 'shop')).toBeUndefined()
    expect(catalogue.count(SITE, 'shop')).toEqual({ valid: 0 })
    expect(catalogue.noteMark(SITE, '101', 1, 10, one)).toBe(false)
    expect(catalogue.noteMark(SITE, '103', 1, 30, one)).toBe(true)
    expect(catalogue.noteMark(SITE, '103', 1, 30, one)).toBe(false)
    expect(catalogue.find(SITE, 'shop', 'c1')).toEqual({ id: 'c1', atUnixMs: 1000, kind: 'automatic', state: 'valid', vms: ['101', '102', '103'], namedSeqs: { 101: 10, 102: 20, 103: 30 } })
    expect(catalogue.count(SITE, 'shop')).toEqual({ valid: 1, oldestAtUnixMs: 1000 })
  })

  test('sites and groups do not see each other', () => {
    using catalogue = new Catalogue(':memory:')
    noteAll(catalogue, mark('c1', 1000), 10)
    expect(catalogue.latest('site-b', 'shop')).toBeUndefined()
    expect(catalogue.latest(SITE, 'mail')).toBeUndefined()
    catalogue.noteVpg(SITE, 'shop', ['101', '102'])
    catalogue.noteVpg('site-b', 'shop', ['7'])
    catalogue.noteVpg(SITE, 'shop', ['101'])
    expect(catalogue.listVpgs()).toEqual([{ siteId: SITE, name: 'shop', vms: ['101'] }, { siteId: 'site-b', name: 'shop', vms: ['7'] }])
  })

  test('a group is known by its markers alone, with the members of its newest checkpoint, in whatever order journals are read', () => {
    using catalogue = new Catalogue(':memory:')
    noteAll(catalogue, mark('c2', 2000, ['101', '103']), 20)
    noteAll(catalogue, mark('c1', 1000, ['101', '102']), 10)
    expect(catalogue.listVpgs()).toEqual([{ siteId: SITE, name: 'shop', vms: ['101', '103'] }])
    noteAll(catalogue, mark('c3', 3000, ['101']), 30)
    expect(catalogue.listVpgs()).toEqual([{ siteId: SITE, name: 'shop', vms: ['101'] }])
  })

  test('is proved when every VM is, suspect when one is; a judgement stays, and never reaches another epoch', () => {
    using catalogue = new Catalogue(':memory:')
    for (let n = 1; n <= 4; n++) noteAll(catalogue, mark(`c${n}`, n * 1000), n * 10, n === 4 ? 2 : 1)
    catalogue.noteProof(SITE, '101', 1, 10, true)
    expect(stateOf(catalogue, 'c1')).toBe('valid')
    catalogue.noteProof(SITE, '102', 1, 25, true)
    expect(['c1', 'c2', 'c3'].map((id) => stateOf(catalogue, id))).toEqual(['proved', 'valid', 'valid'])
    catalogue.noteProof(SITE, '101', 1, 1000, false)
    expect(['c1', 'c2', 'c3', 'c4'].map((id) => stateOf(catalogue, id))).toEqual(['proved', 'suspect', 'suspect', 'valid'])
    catalogue.noteProof(SITE, '101', 1, 1000, true)
    expect(stateOf(catalogue, 'c3')).toBe('suspect')
    catalogue.noteProof(SITE, '101', 2, 1000, false)
    expect(catalogue.latest(SITE, 'shop')?.id).toBe('c1')
  })

  test('a proof speaks of nothing from before its attach, a mismatch of everything not judged yet', () => {
    using catalogue = new Catalogue(':memory:')
    for (let n = 1; n <= 3; n++) noteAll(catalogue, mark(`c${n}`, n * 1000), n * 10)
    for (const vm of ['101', '102']) catalogue.noteProof(SITE, vm, 1, 25, true, 15)
    expect(['c1', 'c2', 'c3'].map((id) => stateOf(catalogue, id))).toEqual(['valid', 'proved', 'valid'])
    catalogue.noteProof(SITE, '101', 1, 1000, false, 15)
    expect(['c1', 'c2', 'c3'].map((id) => stateOf(catalogue, id))).toEqual(['suspect', 'proved', 'suspect'])
  })

  test('the newest is chosen by label: at or before a moment, tagged, never pending or suspect', () => {
    using catalogue = new Catalogue(':memory:')
    noteAll(catalogue, mark('c1', 1000, undefined, { kind: 'tagged', tag: 'before' }), 10)
    noteAll(catalogue, mark('c2', 2000), 20)
    noteAll(catalogue, mark('c3', 3000), 30, 2)
    catalogue.noteMark(SITE, '101', 2, 40, mark('c4', 4000))
    catalogue.noteProof(SITE, '102', 2, 30, false)
    expect(catalogue.latest(SITE, 'shop')?.id).toBe('c2')
    expect(catalogue.latest(SITE, 'shop', { notAfterUnixMs: 2000 })?.id).toBe('c2')
    expect(catalogue.latest(SITE, 'shop', { notAfterUnixMs: 1999 })).toMatchObject({ id: 'c1', tag: 'before', kind: 'tagged' })
    expect(catalogue.latest(SITE, 'shop', { notAfterUnixMs: 999 })).toBeUndefined()
    expect(catalogue.latest(SITE, 'shop', { taggedOnly: true })?.id).toBe('c1')
    expect(catalogue.list(SITE, 'shop', { limit: 10 }).map(({ id, state }) => [id, state])).toEqual([['c4', 'pending'], ['c3', 'suspect'], ['c2', 'valid'], ['c1', 'valid']])
    expect(catalogue.list(SITE, 'shop', { limit: 2, toUnixMs: 3000 }).map(({ id }) => id)).toEqual(['c3', 'c2'])
    expect(catalogue.list(SITE, 'shop', { limit: 9, fromUnixMs: 2000, toUnixMs: 2000 }).map(({ id }) => id)).toEqual(['c2'])
  })

  test('a cut that some VM never marked is forgotten a minute after a later one became valid, not before', () => {
    using catalogue = new Catalogue(':memory:')
    catalogue.noteMark(SITE, '101', 1, 10, mark('half', 1000))
    noteAll(catalogue, mark('c2', 61_000), 20)
    expect(stateOf(catalogue, 'half')).toBe('pending')
    noteAll(catalogue, mark('c3', 61_001), 30)
    expect(stateOf(catalogue, 'half')).toBeUndefined()
  })

  test('what is to be kept because of a sync: named when it ended with a change, forgotten when it found none, and with its history', () => {
    using catalogue = new Catalogue(':memory:')
    const wishes = (): unknown[] => catalogue.beforeSyncs(SITE, '101').map(({ seq, changed }) => [seq, changed])
    catalogue.noteSyncBegin(SITE, '101', 10, 'before it was started')
    expect(catalogue.beforeSyncs(SITE, '101')).toEqual([{ vm: '101', seq: 10, tag: 'before it was started', changed: false }])
    expect(catalogue.beforeSyncs(SITE, '102')).toEqual([])
    catalogue.noteSyncEnd(SITE, '101', false)
    expect(wishes()).toEqual([])
    catalogue.noteSyncBegin(SITE, '101', 20, 'broken off')
    catalogue.noteSyncBegin(SITE, '101', 25)
    catalogue.noteSyncBegin(SITE, '101', 27, 'again')
    expect(wishes()).toEqual([[20, false]])
    catalogue.noteSyncEnd(SITE, '101', false)
    expect(wishes()).toEqual([[20, true]])
    catalogue.noteSyncBegin(SITE, '101', 30, 'changed')
    catalogue.noteSyncEnd(SITE, '101')
    catalogue.noteSyncBegin(SITE, '101', 40, 'not over')
    expect(wishes()).toEqual([[20, true], [30, true], [40, false]])
    catalogue.dropBelow(SITE, new Map([['101', 25]]))
    catalogue.forgetBeforeSync(SITE, '101', 40)
    expect(wishes()).toEqual([[30, true]])
    catalogue.forgetVm(SITE, '101')
    expect(wishes()).toEqual([])
  })

  test('what is below a floor in any VM is forgotten, in parts, with its markers in all of them', () => {
    using catalogue = new Catalogue(':memory:')
    for (let n = 1; n <= 20; n++) for (const [at, vm] of ['101', '102'].entries()) catalogue.noteMark(SITE, vm, 1, n * 10 + at, mark(`c${n}`, n * 1000))
    catalogue.noteMark(SITE, '103', 1, 5, mark('other', 500, ['103'], { vpg: 'mail' }))
    const floors = new Map([['101', 100], ['102', 101]])
    expect(catalogue.dropBelow(SITE, floors, 4)).toBe(4)
    expect(catalogue.count(SITE, 'shop').valid).toBe(16)
    while (catalogue.dropBelow(SITE, floors, 4) > 0);
    expect(catalogue.list(SITE, 'shop', { limit: 50 }).map(({ id }) => id)).toEqual(Array.from({ length: 11 }, (_, at) => `c${20 - at}`))
    expect(catalogue.oldest(SITE, 'shop')?.id).toBe('c10')
    expect(catalogue.dropBelow('site-b', floors)).toBe(0)
    expect(catalogue.count(SITE, 'mail').valid).toBe(1)
    catalogue.drop(SITE, 'shop', catalogue.ascending(SITE, 'shop', { fromUnixMs: 11_000, toUnixMs: 13_000, limit: 9 }))
    expect(catalogue.ascending(SITE, 'shop', { fromUnixMs: 0, toUnixMs: 15_000, limit: 9 }).map(({ id }) => id)).toEqual(['c10', 'c13', 'c14'])
  })

  test('candidates are found by sequence, never by label; suspect and pending ones are none', () => {
    using catalogue = new Catalogue(':memory:')
    const labels = [5000, 4000, 9000, 1000, 2000]
    labels.forEach((label, at) => noteAll(catalogue, mark(`c${at}`, label), 10 * (at + 1)))
    catalogue.noteMark(SITE, '101', 1, 60, mark('half', 99_000))
    const newest = (limits: [string, number][]) => catalogue.newestAtOrBelow(SITE, 'shop', new Map(limits))?.id
    expect(newest([['101', Infinity]])).toBe('c4')
    expect(newest([['101', 40], ['102', 35]])).toBe('c2')
    expect(newest([['101', 9]])).toBeUndefined()
    // A VM that joined later knows nothing of what was before.
    expect(newest([['777', 5], ['102', 25]])).toBe('c1')
    expect(catalogue.oldestAtOrAbove(SITE, 'shop', '102', 11)?.id).toBe('c1')
    expect(catalogue.oldestAtOrAbove(SITE, 'shop', '101', 51)).toBeUndefined()
    catalogue.noteProof(SITE, '102', 1, 20, true)
    catalogue.noteProof(SITE, '102', 1, 30, false)
    expect(newest([['101', 30]])).toBe('c1')
    expect(catalogue.oldestAtOrAbove(SITE, 'shop', '101', 30)?.id).toBe('c3')
    expect(catalogue.newestAtOrBelow(SITE, 'mail', new Map([['101', Infinity]]))).toBeUndefined()
  })

  test('noting and forgetting do not get slower with the list', () => {
    using catalogue = new Catalogue(':memory:')
    const thousand = (from: number): number => {
      const startedMs = performance.now()
      catalogue.batch(() => {
        for (let n = from; n < from + 1000; n++) noteAll(catalogue, mark(`c${n}`, n * 1000), n)
      })
      return performance.now() - startedMs
    }
    thousand(0)
    const first = Math.min(thousand(1000), thousand(2000))
    for (let from = 3000; from < 18_000; from += 1000) thousand(from)
    const last = Math.min(thousand(18_000), thousand(19_000), thousand(20_000))
    expect(last).toBeLessThan(first * 5 + 50)
  })

  test('a batch is whole or not at all', () => {
    using catalogue = new Catalogue(':memory:')
    expect(() => catalogue.batch(() => {
      noteAll(catalogue, mark('c1', 1000), 10)
      catalogue.noteSeen(SITE, '101', 10)
      throw new Error('cut off')
    })).toThrow('cut off')
    expect([stateOf(catalogue, 'c1'), catalogue.seenSeq(SITE, '101')]).toEqual([undefined, 0])
    expect(catalogue.batch(() => noteAll(catalogue, mark('c1', 1000), 10))).toEqual([false, true])
  })

  test('what was seen only grows; dispose twice is once', () => {
    const catalogue = new Catalogue(':memory:')
    for (const seq of [5, 9, 7]) catalogue.noteSeen(SITE, '101', seq)
    expect(catalogue.seenSeq(SITE, '101')).toBe(9)
    catalogue[Symbol.dispose]()
    catalogue[Symbol.dispose]()
  })
})

test('made again from the journals, VM by VM, it holds the same as when the marks came interleaved', () => {
  let state = 7
  const random = (below: number): number => (state = (Math.imul(state, 1_103_515_245) + 12_345) & 0x7fff_ffff) % below
  for (let run = 0; run < 40; run++) {
    const vms = ['101', '102', '103'].slice(0, 1 + random(3))
    const journals = new Map<string, ((catalogue: Catalogue) => void)[]>(vms.map((vm) => [vm, []]))
    for (let n = 1; n <= 60; n++) {
      const one = mark(`c${n}`, n * 3000, vms)
      const epoch = 1 + Math.floor(n / 25)
      for (const vm of vms) {
        // Abandoned cuts lack a marker somewhere.
        if (random(12) > 0) journals.get(vm)?.push((catalogue) => catalogue.noteMark(SITE, vm, epoch, n * 10, one))
        if (random(5) === 0) {
          const ok = random(6) > 0
          journals.get(vm)?.push((catalogue) => catalogue.noteProof(SITE, vm, epoch, n * 10 - 5, ok))
        }
      }
    }
    using live = new Catalogue(':memory:')
    const at = new Map(vms.map((vm) => [vm, 0]))
    for (;;) {
      const open = vms.filter((vm) => (at.get(vm) ?? 0) < (journals.get(vm)?.length ?? 0))
      if (open.length === 0) break
      const vm = open[random(open.length)]
      journals.get(vm)?.[at.get(vm) ?? 0](live)
      at.set(vm, (at.get(vm) ?? 0) + 1)
    }
    using again = new Catalogue(':memory:')
    for (const steps of journals.values()) for (const step of steps) step(again)
    const rows = (catalogue: Catalogue) => catalogue.list(SITE, 'shop', { limit: 1000 }).filter(({ state: is }) => is !== 'pending')
    expect(rows(again)).toEqual(rows(live))
    expect(rows(live).length).toBeGreaterThan(10)
  }
})
