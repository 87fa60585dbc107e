import { PassThrough } from 'node:stream'
import { describe, expect, test } from '@jest/globals'
import { formatToken, PairRequest, parseToken, receiveMessage, sendMessage } from './index.ts'

const token = { host: 'agent.example', port: 7402, caFingerprintSha256: 'ab'.repeat(32), secret: 'A'.repeat(43) }
const request: PairRequest = { version: 1, secret: 's', siteId: '01234567-89ab-cdef-0123-456789abcdef', csrPem: 'x' }

describe('token', () => {
  test('what is formatted is parsed, with white space around it', () => {
    const text = formatToken(token)
    expect(text).toMatch(/^cdp1\.[A-Za-z0-9_-]+$/)
    expect(parseToken(` ${text}\n`)).toEqual(token)
  })

  test('a token cut at any place is refused, and its content is not repeated', () => {
    const text = formatToken(token)
    for (let length = 0; length < text.length; length += 1) {
      let message = ''
      try {
        parseToken(text.slice(0, length))
      } catch (error) {
        message = JSON.stringify(error)
      }
      expect(message).toContain('BAD_INPUT')
      expect(message).not.toContain(token.secret)
    }
  })

  test('foreign, foreign-version and nonsensical tokens are refused', () => {
    const of = (content: unknown): string => `cdp1.${Buffer.from(JSON.stringify(content)).toString('base64url')}`
    for (const text of [
      'hello',
      'cdp2.abc',
      of(null),
      of([]),
      of({ ...token, port: 0 }),
      of({ ...token, host: 'a b' }),
      of({ ...token, more: 1 }),
      of({ ...token, secret: 'short' }),
      `cdp1.${'A'.repeat(5000)}`,
    ]) {
      expect(() => parseToken(text)).toThrow(expect.objectContaining({ code: 'BAD_INPUT' }))
    }
    expect(() => formatToken({ ...token, host: '' })).toThrow(expect.objectContaining({ code: 'BAD_INPUT' }))
  })
})

describe('wire', () => {
  test('a message arrives whole for any chunking', async () => {
    const whole = new PassThrough()
    sendMessage(whole, request)
    const bytes = Buffer.concat((await whole.end().toArray()) as Buffer[])
    for (const size of [1, 3, 7, bytes.length]) {
      const socket = new PassThrough()
      const received = receiveMessage(socket, PairRequest, { deadlineMs: 1000 })
      for (let at = 0; at < bytes.length; at += size) socket.write(bytes.subarray(at, at + size))
      expect(await received).toEqual(request)
    }
  })

  const cases: [string, Buffer, string][] = [
    ['an absurd length', Buffer.from([0xff, 0xff, 0xff, 0xff]), 'STREAM_PROTOCOL'],
    ['no JSON', Buffer.from([0, 0, 0, 2, 0x7b, 0x7b]), 'STREAM_PROTOCOL'],
    ['a message of another shape', Buffer.from('\0\0\0\x02{}'), 'STREAM_PROTOCOL'],
    ['bytes after the message', Buffer.from('\0\0\0\x02{}x'), 'STREAM_PROTOCOL'],
    ['half a message', Buffer.from('\0\0\0\x09{'), 'CLOSED'],
  ]
  test.each(cases)('%s is an error', async (_name, bytes, code) => {
    const socket = new PassThrough()
    socket.end(bytes)
    await expect(receiveMessage(socket, PairRequest, { deadlineMs: 1000 })).rejects.toMatchObject({ code })
  })

  test('silence ends at the deadline, a close without a byte is no error', async () => {
    await expect(receiveMessage(new PassThrough(), PairRequest, { deadlineMs: 20 })).rejects.toMatchObject({ code: 'TIMEOUT' })
    const closed = new PassThrough()
    closed.end()
    expect(await receiveMessage(closed, PairRequest, { deadlineMs: 1000 })).toBeUndefined()
  })
})
