import { describe, expect, test } from '@jest/globals'
import { formatTable, painter } from './table.ts'
import { formatAge, formatBytes, formatDuration, formatMicroseconds, formatTime, printable } from './units.ts'

describe('units', () => {
  test.each([
    [0, '0 B'],
    [1023, '1023 B'],
    [1024, '1 KiB'],
    [1536, '1.5 KiB'],
    [1048575, '1 MiB'],
    [34359738368, '32 GiB'],
    [120 * 1024 ** 4, '120 TiB'],
    [2 ** 53, '8 PiB'],
  ])('%d bytes are %s', (bytes, text) => {
    expect(formatBytes(bytes)).toBe(text)
  })

  test.each([
    [0, '0 ms'],
    [999.4, '999 ms'],
    [1000, '1 s'],
    [3249, '3.2 s'],
    [9949, '9.9 s'],
    [9960, '10 s'],
    [59_400, '59 s'],
    [59_600, '1 min'],
    [65_000, '1 min 5 s'],
    [3_600_000, '1 h'],
    [93_600_000, '1 d 2 h'],
  ])('%d ms are %s', (ms, text) => {
    expect(formatDuration(ms)).toBe(text)
  })

  test('latencies, ages and times', () => {
    expect([85, 1234, 2_500_000].map(formatMicroseconds)).toEqual(['85 us', '1.2 ms', '2.5 s'])
    expect(formatAge(1000, 4000)).toBe('3 s ago')
    expect(formatAge(4000, 1000)).toBe('in 3 s')
    const unixMs = Date.UTC(2026, 10, 23, 7, 4, 43, 120)
    expect(formatTime(unixMs)).toMatch(/^\d{4}-\d\d-\d\dT\d\d:\d\d:43[+-]\d\d:\d\d$/)
    expect(Date.parse(formatTime(unixMs, { milliseconds: true }))).toBe(unixMs)
  })

  test('nothing that steers a terminal passes', () => {
    expect(printable('a\x1b[31mb\r\nc\u202ed')).toBe('a [31mb c d')
  })
})

describe('table', () => {
  test('columns are as wide as their widest cell, colour does not count', () => {
    const rows = [
      ['1', { text: 'ok', style: 'green' as const }],
      ['1000', 'long text'],
    ]
    const columns = [{ title: 'N', align: 'right' as const }, { title: 'STATE' }]
    expect(formatTable(columns, rows, painter(false))).toBe('   N  STATE\n   1  ok\n1000  long text\n')
    // eslint-disable-next-line no-control-regex
    expect(formatTable(columns, rows, painter(true)).replaceAll(/\x1b\[\d+m/g, '')).toBe('   N  STATE\n   1  ok\n1000  long text\n')
    expect(formatTable(columns, rows, painter(true))).toContain('\x1b[32mok')
  })
})
