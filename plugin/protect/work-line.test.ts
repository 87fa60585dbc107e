import { expect, test } from '@jest/globals'
import { WorkLine } from './work-line.ts'

/** Works that tell when they begin, and end when they are told to. */
const works = () => {
  const said: string[] = []
  const ends = new Map<string, PromiseWithResolvers<string>>()
  const work = (name: string) => (): Promise<string> => {
    said.push(name)
    const end = Promise.withResolvers<string>()
    ends.set(name, end)
    return end.promise
  }
  const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve))
  return { said, work, turn, end: async (name: string) => (ends.get(name)?.resolve(name), turn()), fail: async (name: string) => (ends.get(name)?.reject(new Error(name)), turn()) }
}

test('one after the other, also behind one that failed', async () => {
  const line = new WorkLine()
  const { said, work, turn, end, fail } = works()
  const [first, second, third] = [line.run(work('a')), line.runBeside(work('b')), line.run(work('c'))]
  await turn()
  expect(said).toEqual(['a'])
  const failed = expect(first).rejects.toThrow('a')
  await fail('a')
  await failed
  expect(said).toEqual(['a', 'b'])
  await end('b')
  await end('c')
  expect([said, await second, await third]).toEqual([['a', 'b', 'c'], 'b', 'c'])
})

test.each(['ends', 'fails'] as const)('a long work begins in its turn and leaves the line; beside it goes what may, all else waits until it %s', async (how) => {
  const line = new WorkLine()
  const { said, work, turn, end, fail } = works()
  const before = line.run(work('before'))
  const long = line.runLong(work('long'))
  const outcome = long.then((value) => `it ends: ${value}`, () => 'it fails')
  await turn()
  expect(said).toEqual(['before'])
  await end('before')
  await before
  const beside = line.runBeside(work('beside'))
  await turn()
  expect(said).toEqual(['before', 'long', 'beside'])
  await end('beside')
  expect(await beside).toBe('beside')
  let isIdle = false
  const [later, other, idle] = [line.run(work('later')), line.runLong(work('other')), line.idle().then(() => (isIdle = true))]
  await turn()
  expect(said).toEqual(['before', 'long', 'beside'])
  await (how === 'ends' ? end('long') : fail('long'))
  expect(await outcome).toBe(how === 'ends' ? 'it ends: long' : 'it fails')
  expect(said.slice(3)).toEqual(['later'])
  await end('later')
  expect([said.slice(3), await later, isIdle]).toEqual([['later', 'other'], 'later', false])
  await end('other')
  await Promise.all([other, idle])
})
