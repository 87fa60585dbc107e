import { PassThrough } from 'node:stream'
import { describe, expect, test } from '@jest/globals'
import { CdpError } from '../errors/index.ts'
import { createDaemonLog, loggerTo } from './index.ts'
import type { LogLine } from './index.ts'
import { humanLine } from './logger.ts'

const collect = (level: 'info' | 'debug') => {
  const lines: LogLine[] = []
  return { lines, log: loggerTo(level, (line) => lines.push(line), { nowUnixMs: () => 1_700_000_000_000 }) }
}

describe('log', () => {
  test('a level that is off builds nothing', () => {
    const { lines, log } = collect('info')
    expect(log.enabled('debug')).toBe(false)
    log.debug('hidden', {
      get costly(): never {
        throw new Error('was built')
      },
    })
    expect(lines).toHaveLength(0)
    log.warn('shown')
    expect(lines[0]?.message).toBe('shown')
  })

  test('secrets are taken out by key, nested, in errors and inside text', () => {
    const { lines, log } = collect('info')
    const error = new CdpError('PAIRING', 'refused cdp1.abcDEF_-1', { context: { secretHash: 'x', address: '::1' }, cause: new Error('password=ok') })
    log.info('token cdp1.eyJhIjoxfQ used', {
      token: 't0p',
      nested: { privateKey: 'k', attempts: 3 },
      list: [{ apiToken: 'z' }],
      error,
      pem: '-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----',
    })
    const printed = JSON.stringify(lines[0])
    for (const leaked of ['eyJhIjoxfQ', 't0p', '"k"', '"z"', 'abcDEF', 'AAAA', '"x"']) expect(printed).not.toContain(leaked)
    expect(printed).toContain('"attempts":3')
    expect(printed).toContain('"address":"::1"')
  })

  test('cycles, functions, long text and many entries are bounded, never thrown at', () => {
    const { lines, log } = collect('info')
    const cycle: Record<string, unknown> = { big: 10n, fn: () => 1, long: 'x'.repeat(10_000) }
    cycle['self'] = cycle
    log.info('odd', { cycle, many: Array.from({ length: 1000 }, (_, index) => index) })
    expect(JSON.stringify(lines[0]).length).toBeLessThan(30_000)
  })

  test('children add their fields to every line', () => {
    const { lines, log } = collect('debug')
    log.child({ vmId: 101 }).child({ disk: 'scsi0' }).debug('attached', { seq: 1 })
    expect(lines[0]?.fields).toEqual({ vmId: 101, disk: 'scsi0', seq: 1 })
  })

  test('the daemon log writes one JSON object a line, or one human line', async () => {
    const stream = new PassThrough()
    const log = createDaemonLog({ level: 'info', format: 'json', fields: { daemon: 'agent' }, stream })
    log.info('listening', { port: 7402 })
    log.debug('not written')
    const [chunk] = (await stream.take(1).toArray()) as Buffer[]
    expect(JSON.parse(String(chunk))).toMatchObject({ level: 'info', message: 'listening', daemon: 'agent', port: 7402 })
    expect(humanLine({ level: 'warn', atUnixMs: 0, message: 'two\nlines', fields: { a: 'b c', n: 1 } })).toBe(
      '1970-01-01T00:00:00.000Z warn  two lines a="b c" n=1',
    )
  })
})
