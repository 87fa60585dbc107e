import { expect, test } from '@jest/globals'
import { roundsText } from './status-text.ts'

test('incremental rounds are told with the moment that the VM can be recovered to', () => {
  const nowUnixMs = Date.parse('2026-11-23T07:00:00Z')
  expect(roundsText({ count: 0 }, nowUnixMs)).toBe('the first round under the backup is under way')
  expect(roundsText({ count: 1, lastUnixMs: nowUnixMs - 8000 }, nowUnixMs)).toMatch(/^1 round under the backup, the newest 2026-11-23T.* \(8 s ago\)$/)
  expect(roundsText({ count: 12, lastUnixMs: nowUnixMs - 8000 }, nowUnixMs)).toMatch(/^12 rounds /)
})
