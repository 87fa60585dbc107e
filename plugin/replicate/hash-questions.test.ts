import { afterEach, beforeEach, expect, jest, test } from '@jest/globals'
import { CdpError } from '../../core/errors/index.ts'
import { HASH_EXTENT_BYTES } from '../../core/stream/index.ts'
import type { HashRequest } from '../../core/stream/index.ts'
import { HashQuestions } from './hash-questions.ts'

const question = { disk: 0, asOfSeq: 5, offsetBytes: 0, extentBytes: HASH_EXTENT_BYTES, extentCount: 2 }
const reply = (requestId: number) => ({ requestId, marks: Uint8Array.of(1, 1), hashes: Buffer.alloc(0) })
const settle = async (): Promise<void> => {
  for (let n = 0; n < 10; n++) await Promise.resolve()
}
beforeEach(() => void jest.useFakeTimers())
afterEach(() => void jest.useRealTimers())

test('four questions are on their way at most; each answer lets the next one go', async () => {
  const sent: HashRequest[] = []
  const questions = new HashQuestions((request) => void sent.push(request))
  const answers = Array.from({ length: 7 }, () => questions.ask(question))
  await settle()
  expect(sent.map(({ requestId }) => requestId)).toEqual([1, 2, 3, 4])
  questions.take(reply(3))
  questions.take(reply(1))
  await settle()
  expect(sent.map(({ requestId }) => requestId)).toEqual([1, 2, 3, 4, 5, 6])
  for (const id of [2, 4, 5, 6]) questions.take(reply(id))
  await settle()
  questions.take(reply(7))
  expect(await Promise.all(answers)).toHaveLength(7)
  // Nobody waits for that one any more.
  questions.take(reply(2))
})

test('errors keep their meaning; an answer for other extents breaks the stream', async () => {
  const questions = new HashQuestions(() => undefined)
  const gone = questions.ask(question)
  questions.take({ requestId: 1, error: { code: 'NOT_FOUND', message: 'it has left the history' } })
  await expect(gone).rejects.toMatchObject({ code: 'NOT_FOUND' })
  const strange = questions.ask(question)
  questions.take({ requestId: 2, error: { code: 'SOMETHING_NEW', message: 'x' } })
  await expect(strange).rejects.toMatchObject({ code: 'IO' })
  const wrong = questions.ask(question)
  wrong.catch(() => undefined)
  expect(() => questions.take({ requestId: 3, marks: Uint8Array.of(1), hashes: Buffer.alloc(0) })).toThrow(expect.objectContaining({ code: 'STREAM_PROTOCOL' }))
  questions.drop('over')
})

test('a connection that is lost takes its questions with it; those that waited find that there is none', async () => {
  let isUp = true
  const questions = new HashQuestions(() => {
    if (!isUp) throw new CdpError('CLOSED', 'the link is down')
  })
  const answers = Array.from({ length: 6 }, () => questions.ask(question))
  await settle()
  isUp = false
  questions.drop('reset by peer')
  for (const answer of answers) await expect(answer).rejects.toMatchObject({ code: 'CLOSED' })
  isUp = true
  const next = questions.ask(question)
  questions.take(reply(7))
  expect(await next).toMatchObject({ marks: Uint8Array.of(1, 1) })
})

test('an agent that hangs is not waited for without end', async () => {
  const questions = new HashQuestions(() => undefined)
  const asked = questions.ask(question)
  asked.catch(() => undefined)
  await settle()
  jest.advanceTimersByTime(120_000)
  await expect(asked).rejects.toMatchObject({ code: 'TIMEOUT' })
})
