import { expect, test } from '@jest/globals'
import { RoundLedger } from './round-ledger.ts'

const disks = ['scsi0', 'scsi1']

test('a round is whole when each disk was connected and every connection of it ended cleanly', () => {
  const ledger = new RoundLedger()
  expect(ledger.missing(disks)).toContain('no round')
  ledger.begin()
  ledger.opened('scsi0')
  ledger.closed('scsi0', true, '')
  expect(ledger.missing(disks)).toContain('scsi1')
  ledger.opened('scsi1')
  expect(ledger.missing(disks)).toContain('still connected')
  ledger.closed('scsi1', true, '')
  expect(ledger.missing(disks)).toBeUndefined()
  ledger.end()
  expect(ledger.missing(disks)).toContain('no round')
})

test('one broken connection spoils this round and not the next', () => {
  const ledger = new RoundLedger()
  ledger.begin()
  for (const key of disks) ledger.opened(key)
  ledger.closed('scsi0', false, 'reset by the peer')
  ledger.opened('scsi0')
  for (const key of disks) ledger.closed(key, true, '')
  expect(ledger.missing(disks)).toContain('reset by the peer')
  ledger.begin()
  for (const key of disks) ledger.opened(key)
  for (const key of disks) ledger.closed(key, true, '')
  expect(ledger.missing(disks)).toBeUndefined()
})

test('the late end of a connection from before the round is nothing to it', () => {
  const ledger = new RoundLedger()
  ledger.opened('scsi0')
  ledger.begin()
  ledger.closed('scsi0', true, '')
  for (const key of disks) ledger.opened(key)
  for (const key of disks) ledger.closed(key, true, '')
  expect(ledger.missing(disks)).toBeUndefined()
})
