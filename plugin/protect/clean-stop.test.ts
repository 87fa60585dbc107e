import { describe, expect, test } from '@jest/globals'
import { judgeStop, whySync } from './clean-stop.ts'
import type { CleanStop, StartFacts, StopFacts } from './clean-stop.ts'
import { differenceOf, fileSystemOf } from './file-proof.ts'
import type { FileProof } from './file-proof.ts'

const AT_MS = 1_000_000
const disks = [{ disk: 0, key: 'scsi0', sizeBytes: 4096 }, { disk: 1, key: 'scsi1', sizeBytes: 8192 }]
const file = (key: string, changedAtMs: number): FileProof => ({ path: `/images/${key}`, device: '1', inode: key, sizeBytes: '4096', ctimeNs: `${changedAtMs}000000` })
const clean: CleanStop = { bootId: 'b', epoch: 7, lastSeq: 90, disks, files: { scsi0: file('scsi0', AT_MS), scsi1: file('scsi1', AT_MS - 500) } }

const stopped = (change: Partial<StopFacts> = {}): StopFacts => ({
  bootId: 'b', why: 'QEMU ended capture', goodbye: { atUnixMs: AT_MS + 50, unproved: undefined }, last: { epoch: 7, seq: 90, atUnixMs: { scsi0: AT_MS, scsi1: AT_MS - 500 } },
  disks, images: { scsi0: { path: '/images/scsi0', raw: true }, scsi1: { path: '/images/scsi1', raw: true } }, files: clean.files, ...change,
})
const filesWith = (key: string, value: StartFacts['files'][string]): StartFacts['files'] => ({ ...clean.files, [key]: value })

describe('a stop', () => {
  test('is clean when every condition holds', () => {
    expect(judgeStop(stopped())).toEqual({ format: 1, clean })
  })

  test('an image that QEMU also writes to for itself may be younger than the last captured write, up to the goodbye', () => {
    const images = { ...stopped().images, scsi1: { path: '/images/scsi1', raw: false } }
    expect(judgeStop(stopped({ images, files: filesWith('scsi1', file('scsi1', AT_MS + 50)) }))).toHaveProperty('clean')
    expect(judgeStop(stopped({ images, files: filesWith('scsi1', file('scsi1', AT_MS + 60)) }))).toHaveProperty('whyNot')
  })

  test.each<[string, Partial<StopFacts>, RegExp]>([
    ['QEMU was killed, or capture was not in step', { goodbye: undefined, why: 'QEMU ended the connection of scsi0' }, /not in step when the VM stopped \(QEMU ended the connection of scsi0\)/],
    ['the last look found something', { goodbye: { atUnixMs: AT_MS + 50, unproved: 'scsi0: the job of scsi0 was not ready' } }, /not certain .* not ready/],
    ['the worker is gone', { last: undefined }, /worker/],
    ['no boot id', { bootId: undefined }, /boot/],
    ['it ran again before anybody looked', { files: undefined }, /started again before/],
    ['a block device', { images: { scsi0: { path: '/images/scsi0', raw: true }, scsi1: undefined } }, /^scsi1: only files/],
    ['a file system that others write to', { files: filesWith('scsi1', { none: 'a file system of the type nfs4 gives no proof' }) }, /^scsi1: .*nfs4/],
    ['a file that was not looked at', { files: { scsi0: file('scsi0', AT_MS) } }, /^scsi1/],
    ['a write that was not captured, before the goodbye', { files: filesWith('scsi1', file('scsi1', AT_MS - 490)) }, /^scsi1: it was written to after/],
    ['a write after the goodbye', { files: filesWith('scsi0', file('scsi0', AT_MS + 60)) }, /^scsi0: it was written to after/],
    ['a disk whose last write nobody knows', { last: { epoch: 7, seq: 90, atUnixMs: { scsi0: AT_MS } } }, /^scsi1: it was written to after/],
  ])('is not clean: %s', (_what, change, why) => {
    const note = judgeStop(stopped(change))
    expect('whyNot' in note ? note.whyNot : '').toMatch(why)
  })
})

const started = (change: Partial<StartFacts> = {}): StartFacts => ({
  bootId: 'b', commandLine: ['qemu-system-x86_64', '-name', 'incoming'], welcome: { epoch: 8, durableSeq: 90 }, disks: disks.map((disk) => ({ ...disk })), files: { ...clean.files }, missed: undefined, ...change,
})

describe('a start', () => {
  test('needs no sync when every condition holds', () => {
    expect(whySync({ format: 1, clean }, started())).toBeUndefined()
  })

  test('after a stop that was not clean syncs, and says why that was', () => {
    expect(whySync({ format: 1, whyNot: 'scsi0: a block device' }, started())).toBe('scsi0: a block device')
    expect(whySync(undefined, started())).toBe('its last stop was not seen')
  })

  test.each<[string, Partial<StartFacts>, RegExp]>([
    ['migration target', { commandLine: ['qemu', '-incoming', 'tcp:1'] }, /migration/],
    ['restored state', { commandLine: ['qemu', '-loadstate', '/x'] }, /saved state/],
    ['internal snapshot', { commandLine: ['qemu', '--loadvm', 'x'] }, /saved state/],
    ['a command line that cannot be read', { commandLine: undefined }, /cannot be read/],
    ['the guest wrote before the attach', { missed: 'scsi0: the guest wrote before capture was attached' }, /wrote before/],
    ['another boot', { bootId: 'c' }, /node was started again/],
    ['no boot id', { bootId: undefined }, /node was started again/],
    ['a disk less', { disks: disks.slice(0, 1) }, /other disks/],
    ['a disk more', { disks: [...disks, { disk: 2, key: 'scsi2', sizeBytes: 1 }] }, /other disks/],
    ['a disk that has grown', { disks: [disks[0], { ...disks[1], sizeBytes: 16384 }] }, /other disks/],
    ['a disk that came anew', { disks: [disks[0], { ...disks[1], disk: 2 }] }, /other disks/],
    ['another volume', { files: filesWith('scsi1', { ...file('scsi1', AT_MS - 500), path: '/images/other' }) }, /disk changed while the VM was off \(scsi1: it is another file\)/],
    ['a file that was replaced', { files: filesWith('scsi1', { ...file('scsi1', AT_MS - 500), inode: '9' }) }, /scsi1: its file was replaced/],
    ['another device', { files: filesWith('scsi1', { ...file('scsi1', AT_MS - 500), device: '9' }) }, /scsi1: its file was replaced/],
    ['another size', { files: filesWith('scsi1', { ...file('scsi1', AT_MS - 500), sizeBytes: '9' }) }, /scsi1: the size/],
    ['written to, even by an earlier clock', { files: filesWith('scsi1', file('scsi1', AT_MS - 501)) }, /scsi1: its file was changed/],
    ['no proof any more', { files: filesWith('scsi1', { none: 'its storage does not answer' }) }, /scsi1: its storage does not answer/],
    ['a disk that is no file now', { files: { scsi0: file('scsi0', AT_MS) } }, /scsi1/],
    ['another attach in between', { welcome: { epoch: 9, durableSeq: 90 } }, /another attach/],
    ['an agent from a backup', { welcome: { epoch: 7, durableSeq: 90 } }, /another attach/],
    ['not all durable', { welcome: { epoch: 8, durableSeq: 89 } }, /not all at the recovery site/],
    ['more than was sent', { welcome: { epoch: 8, durableSeq: 91 } }, /not all at the recovery site/],
    ['the agent lost data', { welcome: { epoch: 8, durableSeq: 90, agentLostData: true } }, /not all at the recovery site/],
  ])('syncs: %s', (_what, change, why) => {
    expect(whySync({ format: 1, clean }, started(change))).toMatch(why)
  })
})

describe('files', () => {
  test('the file system of a path is that of the longest mount above it, of several at one place the last', () => {
    const mounts = [
      '22 1 8:1 / / rw - ext4 /dev/sda1 rw', '23 22 0:20 / /mnt rw shared:1 master:2 - nfs4 server:/x rw', '24 23 8:2 / /mnt/a\\040b rw - xfs /dev/sdb rw',
      '25 22 8:3 / /data rw - ext4 /dev/sdc rw', '26 25 0:21 / /data rw - cifs //x rw', 'nonsense', '',
    ].join('\n')
    expect(['/images/x', '/mnt', '/mnt/x', '/mnt/a b/x', '/mnt/a bc', '/data/x', '/database'].map((path) => fileSystemOf(mounts, path))).toEqual(['ext4', 'nfs4', 'nfs4', 'xfs', 'nfs4', 'cifs', 'ext4'])
    expect(fileSystemOf('', '/x')).toBeUndefined()
  })

  test('the same look twice is no difference', () => {
    expect(differenceOf(clean.files.scsi0, { ...clean.files.scsi0 })).toBeUndefined()
  })
})
