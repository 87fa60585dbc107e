import { expect, test } from '@jest/globals'
import { whyNoRounds } from './backup-rounds.ts'
import type { VmMemory } from './vm-memory.ts'

const disks = [{ key: 'scsi0', sizeBytes: 100 }, { key: 'scsi1', sizeBytes: 200 }]
const both = new Set(['scsi0', 'scsi1'])
const covered: VmMemory = { format: 1, instance: 'i', bitmaps: 'covered', disks: { scsi0: 100, scsi1: 200 } }

test('rounds need bitmaps that say all that is missing at the recovery site, of the very disks there are', () => {
  expect(whyNoRounds(covered, disks, both)).toBeUndefined()
  expect(whyNoRounds({ format: 1, instance: 'i', bitmaps: 'covered' }, disks, both)).toBeUndefined()
  expect(whyNoRounds(undefined, disks, both)).toBeDefined()
  expect(whyNoRounds({ ...covered, bitmaps: 'copying' }, disks, both)).toBeDefined()
  expect(whyNoRounds({ ...covered, bitmaps: 'attaching' }, disks, both)).toBeDefined()
  expect(whyNoRounds(covered, disks, new Set(['scsi0']))).toContain('scsi1')
  expect(whyNoRounds(covered, [disks[0], { key: 'scsi1', sizeBytes: 201 }], both)).toContain('scsi1')
  expect(whyNoRounds(covered, [...disks, { key: 'scsi2', sizeBytes: 1 }], new Set([...both, 'scsi2']))).toContain('scsi2')
  expect(whyNoRounds(covered, [disks[0]], both)).toContain('scsi1')
})
