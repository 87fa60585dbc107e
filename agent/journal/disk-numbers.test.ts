import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from '@jest/globals'
import type { DiskEntry } from '../../core/record/index.ts'
import { admitDisks, numberDisks, withJoining } from './disk-numbers.ts'
import { seededRandom } from './testing.ts'

const disk = (key: string, sizeBytes = 512) => ({ key, sizeBytes })

/** Attaches, one after the other. */
const numbered = (...rounds: { key: string; sizeBytes: number }[][]): DiskEntry[] => {
  let known: DiskEntry[] = []
  let next = 0
  for (const found of rounds) {
    known = numberDisks(known, next, found)
    next = Math.max(next, ...known.map(({ disk: number }) => number + 1))
  }
  return known
}
const numbersOf = (...rounds: { key: string; sizeBytes: number }[][]): string => numbered(...rounds).map(({ key, disk: number }) => `${key}=${number}`).join(' ')

test('a disk that comes takes no number of others, wherever it is named', () => {
  expect(numbersOf([disk('scsi1'), disk('scsi2')], [disk('scsi0'), disk('scsi1'), disk('scsi2')])).toBe('scsi0=2 scsi1=0 scsi2=1')
})

test('a number is never used again: not of a disk that went, not by the same key when it comes back', () => {
  const both = [disk('scsi0'), disk('scsi1')]
  expect(numbersOf(both, [disk('scsi0')])).toBe('scsi0=0')
  expect(numbersOf(both, [disk('scsi0')], both)).toBe('scsi0=0 scsi1=2')
  expect(numbersOf(both, [disk('scsi1')], [disk('scsi1'), disk('scsi2')])).toBe('scsi1=1 scsi2=2')
})

test('a disk that has grown keeps its number, one that is smaller is another disk', () => {
  expect(numbersOf([disk('scsi0')], [disk('scsi0', 1024)])).toBe('scsi0=0')
  expect(numbersOf([disk('scsi0')], [disk('scsi0', 1024)], [disk('scsi0')])).toBe('scsi0=1')
})

test('with mirrors as the only memory of disks that went, no number changes hands, whatever the protected site believes', async () => {
  const dir = await mkdtemp('/tmp/cdp-')
  const seed = Number(process.env.CDP_SEED ?? Date.now() % 1_000_000)
  const random = seededRandom(seed)
  try {
    await mkdir(join(dir, 'mirror'))
    /** What each number was first given to. */
    const owners = new Map<number, string>()
    let known: DiskEntry[] = []
    for (let round = 0; round < 40; round++) {
      const keys = ['scsi0', 'scsi1', 'scsi2', 'virtio0'].filter(() => random() < 0.6)
      // As from a node that has never seen this VM: its own numbers begin at 0.
      const before = known
      known = await admitDisks(dir, before, keys.map((key, number) => ({ disk: number, key, sizeBytes: 512 })))
      for (const { disk: number, key } of known) {
        const stayed = before.some((one) => one.key === key)
        if (stayed) expect(owners.get(number)).toBe(key)
        else expect([seed, round, owners.has(number)]).toEqual([seed, round, false])
        owners.set(number, key)
        await writeFile(join(dir, `mirror/${number}.raw`), '')
      }
    }
  } finally {
    await rm(dir, { recursive: true, force: true })
  }
})

test('what no disk can be is refused', async () => {
  await expect(admitDisks('/nowhere', [], [disk('scsi0', 100)])).rejects.toMatchObject({ code: 'BAD_INPUT' })
  await expect(admitDisks('/nowhere', [], [disk('scsi0'), disk('scsi0')])).rejects.toMatchObject({ code: 'BAD_INPUT' })
})

test('what came since, or has not joined yet, joins; but a VM of which nothing is whole has no disk that joins', () => {
  const entry = (number: number, joining?: true): DiskEntry => ({ disk: number, key: `scsi${number}`, sizeBytes: 512, ...(joining === undefined ? {} : { joining }) })
  expect(withJoining([entry(0), entry(1, true)], [entry(0), entry(1), entry(2)])).toEqual([entry(0), entry(1, true), entry(2, true)])
  expect(withJoining([entry(0), entry(1, true)], [entry(1), entry(2)])).toEqual([entry(1), entry(2)])
  expect(withJoining([entry(0)], [entry(0)])).toEqual([entry(0)])
})
