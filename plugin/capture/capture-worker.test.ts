import { mkdtempSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, expect, test } from '@jest/globals'
import { checkHandshake } from '../../core/nbd/index.ts'
import { CaptureWorker, GroupClock } from './index.ts'
import type { CaptureEvent, CaptureWorkerOptions } from './index.ts'

const dir = mkdtempSync('/tmp/cdp-')
afterAll(() => rmSync(dir, { recursive: true, force: true }))

const options = (name: string, exits: string[] = [], events: CaptureEvent[] = []): CaptureWorkerOptions => ({
  vm: '101', vpg: 'shop', vms: ['101'], targetPath: join(dir, name), disks: [{ disk: 0, key: 'scsi0', sizeBytes: 1024 * 1024 }],
  agent: { host: '127.0.0.1', port: 1, tls: { authorityPem: '', certificatePem: '', privateKeyPem: '' } }, groupClock: new GroupClock().buffer, budgetBytes: 1 << 24, lingerMs: 5,
  slowAck: { p99Ms: 1000, maxMs: 1000 }, onEvent: (event) => events.push(event), onExit: (why) => exits.push(why),
})

test('a worker that cannot start rejects and says why; nobody is told that it ended', async () => {
  const exits: string[] = []
  await expect(CaptureWorker.start(options('no/such/directory', exits))).rejects.toMatchObject({ code: 'CLOSED', message: expect.stringMatching(/no\/such\/directory/) })
  await new Promise((resolve) => setImmediate(resolve))
  expect(exits).toEqual([])
})

test('a worker sends away whoever connects before a stream is open, beats, answers errors with their code, and what waits for it is rejected when it is killed', async () => {
  const exits: string[] = []
  const worker = await CaptureWorker.start(options('t', exits))
  await expect(checkHandshake({ path: join(dir, 't') }, 'scsi0', 2000)).rejects.toMatchObject({ code: 'CLOSED' })
  const beat = worker.beat
  while (worker.beat === beat) await new Promise((resolve) => setTimeout(resolve, 10))
  await expect(worker.ask('sync', { kind: 'full', reason: 'x', exportSocketPath: '/none', disks: [], rateBytesPerSec: 0 })).rejects.toMatchObject({ code: 'ABORTED' })
  await expect(worker.ask('open', { reason: 'x', epoch: { reason: 'x' } })).rejects.toMatchObject({ code: expect.any(String) })
  const waiting = worker.ask('captured', {})
  const killed = worker.kill('it did not answer')
  await expect(waiting.then(() => 'answered', (error: unknown) => (error as { code: string }).code)).resolves.toMatch(/answered|CLOSED/)
  await killed
  // Its socket goes with it.
  await expect(checkHandshake({ path: join(dir, 't') }, 'scsi0', 2000)).rejects.toThrow(/connect/i)
  expect([exits, worker.exited]).toEqual([['it did not answer'], true])
  await expect(worker.ask('captured', {})).rejects.toMatchObject({ code: 'CLOSED' })
  await worker[Symbol.asyncDispose]()
})
