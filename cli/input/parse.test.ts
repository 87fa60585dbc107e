import { describe, expect, test } from '@jest/globals'
import {
  parseCheckpoint,
  parseCheckpointInterval,
  parseDuration,
  parseHost,
  parseLimit,
  parsePort,
  parseTag,
  parseTime,
  parseVmIds,
  parseVpgName,
} from './parse.ts'
import { UsageError } from './usage-error.ts'

const now = new Date(2026, 10, 23, 7, 30, 15, 0).getTime()
const local = (...parts: [number, number, number, number, number, number?, number?]): number =>
  new Date(...(parts as [number, number, number, number, number])).getTime()

describe('what is typed', () => {
  test.each([
    ['500ms', 500],
    ['5s', 5000],
    ['5', 5000],
    ['1.5m', 90_000],
    ['2 h', 7_200_000],
    ['1d', 86_400_000],
  ])('duration %s', (text, ms) => expect(parseDuration(text)).toBe(ms))
  test.each(['', 'x', '-5s', '5 weeks', '1e3s', '5s5s'])('no duration: "%s"', (text) => expect(() => parseDuration(text)).toThrow(UsageError))

  const times: [string, number][] = [
    ['now', now],
    ['@1763881483120', 1_763_881_483_120],
    ['10m-ago', now - 600_000],
    ['1.5h ago', now - 5_400_000],
    ['07:04', local(2026, 10, 23, 7, 4)],
    ['23:59:58', local(2026, 10, 22, 23, 59) + 58_000],
    ['2026-11-23', local(2026, 10, 23, 0, 0)],
    ['2026-11-23 07:04', local(2026, 10, 23, 7, 4)],
    ['2026-11-23T07:04:43.12', local(2026, 10, 23, 7, 4) + 43_120],
    ['2026-11-23T07:04:43Z', Date.UTC(2026, 10, 23, 7, 4, 43)],
    ['2026-11-23T07:04:43.120+01:30', Date.UTC(2026, 10, 23, 5, 34, 43, 120)],
    ['2024-02-29T00:00Z', Date.UTC(2024, 1, 29)],
  ]
  test.each(times)('time %s', (text, unixMs) => expect(parseTime(text, now)).toBe(unixMs))
  test.each([
    '',
    '25:00',
    '07:60',
    '2026-02-29T00:00',
    '2026-13-01',
    '2026-11-23T24:00',
    '2026-11-23T07:04+25:00',
    'yesterday',
    '@',
    '@99999999999999999',
    'ago',
    '10 ago',
  ])('no time: "%s"', (text) => expect(() => parseTime(text, now)).toThrow(UsageError))

  test('a checkpoint is a word, an id or a time', () => {
    expect(['latest', 'latest-tagged', '17', 'c0ffee-1'].map((text) => parseCheckpoint(text, now))).toEqual(['latest', 'latest-tagged', '17', 'c0ffee-1'])
    expect(parseCheckpoint('10m-ago', now)).toEqual({ atUnixMs: now - 600_000 })
    expect(parseCheckpoint('2026-11-23', now)).toEqual({ atUnixMs: local(2026, 10, 23, 0, 0) })
    for (const text of ['', 'a b', '26:00', 'x/../y', '2026-99-99']) expect(() => parseCheckpoint(text, now)).toThrow(UsageError)
  })

  test('VM ids come apart or by comma, each once', () => {
    expect(parseVmIds(['101', '102,103'])).toEqual([101, 102, 103])
    for (const texts of [['99'], ['0101'], ['1e5'], ['101', '101'], [''], ['vm101'], ['1000000000']]) expect(() => parseVmIds(texts)).toThrow(UsageError)
  })

  test('names, ports, hosts, limits, intervals and tags have bounds', () => {
    expect([
      parseVpgName('web-1.prod'),
      parsePort('7402'),
      parseHost('fe80::1%eth0'),
      parseLimit('10000'),
      parseCheckpointInterval('1s'),
      parseTag('  before upgrade '),
    ]).toEqual(['web-1.prod', 7402, 'fe80::1%eth0', 10_000, 1000, 'before upgrade'])
    const bad = [
      () => parseVpgName(''),
      () => parseVpgName('-x'),
      () => parseVpgName('a/b'),
      () => parseVpgName('x'.repeat(64)),
      () => parsePort('0'),
      () => parsePort('65536'),
      () => parsePort('x'),
      () => parseHost(''),
      () => parseHost('a b'),
      () => parseLimit('0'),
      () => parseLimit('10001'),
      () => parseCheckpointInterval('900ms'),
      () => parseCheckpointInterval('2h'),
      () => parseTag(' '),
      () => parseTag('a\nb'),
      () => parseTag('x'.repeat(201)),
    ]
    for (const each of bad) expect(each).toThrow(UsageError)
  })
})
