import { expect, test } from '@jest/globals'
import { CdpError } from '../../core/errors/index.ts'
import { silentLogger } from '../../core/log/index.ts'
import { MigrationWatch } from './migration-watch.ts'
import type { Whereabouts } from './vm-files.ts'

const watched = (options: { arrived?: boolean; held?: boolean } = {}) => {
  const site = { at: 'here' as Whereabouts, held: options.held ?? false, nowMs: 0, holds: 0, fails: false }
  const watch = new MigrationWatch({
    whereabouts: async () => site.at, arrived: options.arrived ?? false, isHeld: () => site.held, log: silentLogger, nowMs: () => site.nowMs,
    hold: async () => {
      site.holds++
      if (site.fails) throw new CdpError('CONFLICT', 'a backup runs')
      site.held = true
    },
    release: async () => void (site.held = false),
  })
  return { site, at: async (where: Whereabouts): Promise<boolean> => {
    site.at = where
    await watch.look()
    return site.held
  } }
}

test('held from the lock on; let go when the lock is gone and the VM is still here, not when it has left', async () => {
  const { at } = watched()
  expect([await at('here'), await at('leaving'), await at('leaving'), await at('here'), await at('leaving'), await at('elsewhere')]).toEqual([false, true, true, false, true, true])
})

test('met in the middle of a migration: held at once', async () => {
  expect(await watched().at('leaving')).toBe(true)
})

test('of a VM that has just come, the lock that brought it does not count, nor does a hold that is left of the time when it went; the next lock counts', async () => {
  const { at } = watched({ arrived: true, held: true })
  expect([await at('leaving'), await at('leaving'), await at('here'), await at('leaving')]).toEqual([false, false, false, true])
})

test('a hold that fails is tried again, a second later', async () => {
  const { site, at } = watched()
  site.fails = true
  await at('leaving')
  await at('leaving')
  expect(site.holds).toBe(1)
  site.fails = false
  site.nowMs = 1000
  expect([await at('leaving'), site.holds]).toEqual([true, 2])
})
