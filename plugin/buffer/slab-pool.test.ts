import { describe, expect, test } from '@jest/globals'
import { SlabPool } from './index.ts'

const takeAll = (pool: SlabPool, count: number): Buffer[] => Array.from({ length: count }, () => pool.take())

describe('SlabPool', () => {
  test('lets go of what nobody needed from one trim to the next, and of nothing that was in use meanwhile', () => {
    const pool = new SlabPool(4096, 10 * 4096)
    const slabs = takeAll(pool, 6)
    for (const slab of slabs) pool.give(slab)
    pool.trim()
    // Between two calls all of them were free at the least: the first call only began to look.
    expect(pool.freeBytes).toBe(6 * 4096)
    const busy = takeAll(pool, 4)
    for (const slab of busy) pool.give(slab)
    pool.trim()
    expect(pool.freeBytes).toBe(4 * 4096)
    pool.trim()
    expect(pool.freeBytes).toBe(0)
    // Freed at once, not when somebody collects garbage.
    for (const slab of slabs) expect(slab.length).toBe(0)
  })

  test('what is taken while it is trimmed is not touched', () => {
    const pool = new SlabPool(4096, 10 * 4096)
    for (const slab of takeAll(pool, 3)) pool.give(slab)
    pool.trim()
    const taken = pool.take()
    pool.trim()
    pool.trim()
    expect([taken.length, pool.freeBytes]).toEqual([4096, 0])
    pool.give(taken)
    expect(pool.take()).toBe(taken)
  })
})
