import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { silentLogger } from '../../core/log/index.ts'
import { GroupFence } from './group-fence.ts'

let stateDirectory = ''
beforeEach(async () => {
  stateDirectory = await mkdtemp('/tmp/cdp-')
})
afterEach(() => rm(stateDirectory, { recursive: true, force: true }))

const make = (generation?: number, vpg = 'shop'): GroupFence => new GroupFence({ stateDirectory, vpg, generation, log: silentLogger, nowUnixMs: () => 7 })
const loaded = async (generation?: number, vpg?: string): Promise<GroupFence> => {
  const fence = make(generation, vpg)
  await fence.load()
  return fence
}
const takenOver = (generation: number) => ({ verdict: 'superseded' as const, generation, message: 'taken over', hint: 'Decide.' })

describe('GroupFence', () => {
  test('holds from the moment it is raised, tells once, and is there in the next life of the plugin', async () => {
    const fence = await loaded()
    const told: number[] = []
    fence.subscribe(({ generation }) => told.push(generation))
    const unsubscribe = fence.subscribe(() => told.push(-1))
    unsubscribe()
    expect([fence.standing, fence.why]).toEqual([undefined, undefined])
    fence.raise(takenOver(2))
    fence.raise(takenOver(2))
    fence.raise(takenOver(3))
    expect(told).toEqual([2])
    expect(fence.why).toBe('taken over. Decide.')
    await fence.settled()
    expect((await loaded()).standing).toEqual({ generation: 3, why: 'taken over', hint: 'Decide.', sinceUnixMs: 7 })
    expect((await loaded(1, 'other')).standing).toBeUndefined()
  })

  test('does not hold back a site that got the group back in a later generation', async () => {
    const fence = await loaded(2)
    fence.raise(takenOver(2))
    expect(fence.standing).toBeUndefined()
    fence.raise(takenOver(3))
    await fence.settled()
    expect((await loaded(2)).standing?.generation).toBe(3)
    expect((await loaded(3)).standing).toBeUndefined()
  })

  test('a file that says nothing holds nobody, and one that cannot be written holds all the same', async () => {
    for (const text of ['{', '[]', '{"format":1,"generation":"2"}']) {
      await writeFile(join(stateDirectory, 'fence-shop.json'), text)
      expect((await loaded()).standing).toBeUndefined()
    }
    const fence = await loaded()
    await rm(stateDirectory, { recursive: true })
    fence.raise(takenOver(2))
    await fence.settled()
    expect(fence.standing?.generation).toBe(2)
  })

  test('is gone with the group', async () => {
    const fence = await loaded()
    fence.raise(takenOver(2))
    await fence.forget()
    expect(fence.standing).toBeUndefined()
    expect(await readdir(stateDirectory)).toEqual([])
  })
})
