import { describe, expect, test } from '@jest/globals'
import { mkdirSync } from 'node:fs'
import { cpioArchive } from './cpio.ts'
import { endProcess, isAlive, processesWith, tool } from './process.ts'
import { startSiteDaemons, type SiteDaemon } from './site-daemons.ts'
import { makeTempDir } from './tempdir.ts'
import { checkPrefix, recordOf } from './workloads.ts'

const text = (...numbers: number[]): string => numbers.map((n) => `${recordOf(n)}\n`).join('')

describe('checkPrefix', () => {
  test('takes whole records 1..last, dealt over the journals in turn', () => {
    expect(checkPrefix([''])).toEqual({ ok: true, last: 0 })
    expect(checkPrefix([text(1, 2, 3)])).toEqual({ ok: true, last: 3 })
    expect(checkPrefix([text(1, 3, 5), text(2, 4)])).toEqual({ ok: true, last: 5 })
    expect(checkPrefix([text(1, 4), text(2), text(3)])).toEqual({ ok: true, last: 4 })
  })
  test('takes a torn record at the end only where the next one is due', () => {
    expect(checkPrefix([text(1, 3), text(2) + recordOf(4).slice(0, 50)])).toEqual({ ok: true, last: 3 })
    expect(checkPrefix([text(1), text(2) + recordOf(4).slice(0, 50)])).toMatchObject({ ok: false, last: 2 })
    expect(checkPrefix([recordOf(1).slice(0, 9)])).toEqual({ ok: true, last: 0 })
  })
  test('refuses a gap, a later record without an earlier one, a damaged and a repeated record', () => {
    expect(checkPrefix([text(1, 3)])).toMatchObject({ ok: false, last: 1 })
    expect(checkPrefix([text(1), text(2, 4)])).toMatchObject({ ok: false, last: 2, problem: 'journal 1 holds record 4, but record 3 is missing' })
    expect(checkPrefix([text(1, 2).replace(' end', ' eNd')])).toMatchObject({ ok: false, last: 0 })
    expect(checkPrefix([text(1, 1)])).toMatchObject({ ok: false, last: 1 })
    expect(checkPrefix([`${text(1)}${'\0'.repeat(64)}\n`])).toMatchObject({ ok: false })
  })
})

test('a cpio archive is what cpio itself unpacks', async () => {
  await using dir = makeTempDir()
  mkdirSync(`${dir.path}/out`)
  const archive = cpioArchive([
    { name: 'bin', mode: 0o040755 },
    { name: 'bin/program', mode: 0o100755, content: Buffer.from('odd') },
    { name: 'bin/link', mode: 0o120777, content: Buffer.from('program') },
  ])
  await tool('cpio', ['-id', '--quiet'], { cwd: `${dir.path}/out`, input: archive })
  const { stdout } = await tool('sh', ['-c', 'find . -printf "%p %M %l\n" | sort; cat bin/link'], { cwd: `${dir.path}/out` })
  expect(stdout).toBe('. drwxr-xr-x \n./bin drwxr-xr-x \n./bin/link lrwxrwxrwx program\n./bin/program -rwxr-xr-x \nodd')
})

test('site daemons start in order; if one ends instead of answering, its log is in the error and the others are ended', async () => {
  await using dir = makeTempDir()
  const tailing: SiteDaemon = { name: 'one', command: ['tail', '-f', '{config}'], config: (rootDir) => ({ socket: `${rootDir}/api` }), ready: async () => {} }
  const [one] = await startSiteDaemons(dir.path, [tailing])
  expect(one).toMatchObject({ name: 'one', command: ['tail', '-f', `${dir.path}/lab/one.config.json`] })
  expect(isAlive(one.pid)).toBe(true)
  await endProcess(one.pid)
  const failing: SiteDaemon = { ...tailing, name: 'two', command: ['sh', '-c', 'echo no such file; exit 3'], ready: (_rootDir, signal) => new Promise((_resolve, reject) => signal.addEventListener('abort', () => reject(signal.reason))) }
  await expect(startSiteDaemons(dir.path, [tailing, failing])).rejects.toMatchObject({ message: expect.stringContaining('two ended with 3: no such file') })
  expect(processesWith(dir.path)).toEqual([])
})
