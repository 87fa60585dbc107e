import { expect, test } from '@jest/globals'
import { MemberWatch } from './member-watch.ts'

const gone = new Map([[101, 'its configuration is gone']])
const none = new Map<number, string>()

test('a member without protection is told of within 10 s, once, and when it is back', () => {
  const watch = new MemberWatch()
  const told = Array.from({ length: 30 }, (_, second) => ({ second, news: watch.look(gone, second * 1000) })).filter(({ news }) => news.length > 0)
  expect(told).toEqual([{ second: 5, news: [{ vmId: 101, is: 'unprotected', why: 'its configuration is gone' }] }])
  expect(watch.look(none, 31_000)).toEqual([{ vmId: 101, is: 'back' }])
  expect(watch.look(none, 32_000)).toEqual([])
})

test('a move that is over soon is no news; the next one counts from its own beginning', () => {
  const watch = new MemberWatch()
  expect([watch.look(gone, 0), watch.look(gone, 4000), watch.look(none, 5000), watch.look(gone, 6000), watch.look(gone, 9000)].flat()).toEqual([])
  expect(watch.look(gone, 11_000)).toHaveLength(1)
})
