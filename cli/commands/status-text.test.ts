import { expect, test } from '@jest/globals'
import { joiningText, roundsText } from './status-text.ts'

test('incremental rounds are told with the moment that the VM can be recovered to', () => {
  const nowUnixMs = Date.parse('2026-11-23T07:00:00Z')
  expect(roundsText({ count: 0 }, nowUnixMs)).toBe('the first round under the backup is under way')
  expect(roundsText({ count: 1, lastUnixMs: nowUnixMs - 8000 }, nowUnixMs)).toMatch(/^1 round under the backup, the newest 2026-11-23T.* \(8 s ago\)$/)
  expect(roundsText({ count: 12, lastUnixMs: nowUnixMs - 8000 }, nowUnixMs)).toMatch(/^12 rounds /)
})

test('a first copy beside checkpoints is told with how far it has come, or why it has not', () => {
  const joining = { keys: ['scsi1'], doneBytes: 256 * 2 ** 20, totalBytes: 2 ** 30 }
  expect(joiningText(joining)).toBe('first copy of scsi1 beside checkpoints, which lack it until then: 256 MiB of 1 GiB (25 %)')
  expect(joiningText({ ...joining, doneBytes: 0, totalBytes: 0, failed: 'it cannot be read' })).toBe('first copy of scsi1 beside checkpoints, which lack it until then: waits for its next try; the last try ended: it cannot be read')
})
