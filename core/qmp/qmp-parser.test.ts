import { describe, expect, test } from '@jest/globals'
import { QmpParser } from './qmp-parser.ts'
import type { QmpMessage } from './qmp-parser.ts'

const greeting = '{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"}, "capabilities": ["oob"]}}\r\n'
const event = '{"timestamp": {"seconds": 1700000000, "microseconds": 123999}, "event": "BLOCK_JOB_READY", "data": {"device": "größe"}}\r\n'
const reply = '{"return": {"a": [1, 2]}, "id": "x-1"}\r\n'
const refusal = '{"id": "x-2", "error": {"class": "GenericError", "desc": "no"}}\r\n'

const feed = (chunks: readonly Uint8Array[], maxLineBytes?: number): QmpMessage[] => {
  const parser = new QmpParser(maxLineBytes)
  const messages: QmpMessage[] = []
  for (const chunk of chunks) parser.push(chunk, (message) => messages.push(message))
  return messages
}

describe('QmpParser', () => {
  const all = Buffer.from(greeting + event + reply + refusal)
  const expected: QmpMessage[] = [
    { is: 'greeting', version: { major: 10, minor: 0, micro: 2, package: 'Debian' } },
    { is: 'event', event: 'BLOCK_JOB_READY', data: { device: 'größe' }, atUnixMs: 1700000000123 },
    { is: 'return', id: 'x-1', value: { a: [1, 2] } },
    { is: 'error', id: 'x-2', errorClass: 'GenericError', desc: 'no' },
  ]

  test('the same messages come out for any chunking, multi-byte characters cut in two included', () => {
    for (let sizeBytes = 1; sizeBytes <= all.length; sizeBytes++) {
      const chunks = Array.from({ length: Math.ceil(all.length / sizeBytes) }, (_, index) => all.subarray(index * sizeBytes, (index + 1) * sizeBytes))
      expect(feed(chunks)).toEqual(expected)
    }
  })

  test('a reply without an id, or with an id that is no string, is a message without an id', () => {
    expect(feed([Buffer.from('{"return": {}, "id": 7}\n{"error": {"class": "GenericError", "desc": "Expecting a value"}}\n')])).toEqual([
      { is: 'return', id: undefined, value: {} }, { is: 'error', id: undefined, errorClass: 'GenericError', desc: 'Expecting a value' }])
  })

  test('a line that is too long is refused before it ends, in whatever pieces it comes', () => {
    const long = Buffer.alloc(1001, 0x61)
    expect(() => feed([long], 1000)).toThrow(expect.objectContaining({ code: 'QMP_PROTOCOL' }))
    expect(() => feed([long.subarray(0, 600), long.subarray(600)], 1000)).toThrow(expect.objectContaining({ code: 'QMP_PROTOCOL' }))
    expect(feed([Buffer.from(reply)], reply.length)).toHaveLength(1)
  })

  test.each(['hello\n', '[]\n', '{"nothing": 1}\n', '{"QMP": {"version": {"qemu": {"major": -1, "minor": 0, "micro": 0}}}}\n', '{"event": 5, "timestamp": {}}\n', '{"error": "x"}\n'])(
    'what is no QMP is refused: %j', (line) => {
      expect(() => feed([Buffer.from(line)])).toThrow(expect.objectContaining({ code: 'QMP_PROTOCOL' }))
    })

  test('messages before a bad line were handed over', () => {
    const parser = new QmpParser()
    const messages: QmpMessage[] = []
    expect(() => parser.push(Buffer.from(`${reply}garbage\n`), (message) => messages.push(message))).toThrow(expect.objectContaining({ code: 'QMP_PROTOCOL' }))
    expect(messages).toHaveLength(1)
  })
})
