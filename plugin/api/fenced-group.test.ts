import { access, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from '@jest/globals'
import { silentLogger } from '../../core/log/index.ts'
import { Vpg } from '../protect/index.ts'
import type { VpgEvent } from '../protect/index.ts'
import { vpgStatus } from './vpg-status.ts'

let dir = ''
beforeEach(async () => void (dir = await mkdtemp('/tmp/cdp-')))
afterEach(() => rm(dir, { recursive: true, force: true }))

const fencePath = (): string => join(dir, 'fence-shop.json')
const group = (generation?: number): { vpg: Vpg; until: (done: (events: readonly VpgEvent[]) => boolean) => Promise<void> } => {
  const events: VpgEvent[] = []
  let wake = (): void => undefined
  const settings = {
    paths: { qemuServerDirectory: dir, pveDirectory: dir }, stateDirectory: dir, runDirectory: dir, memoryBytesPerVm: 1 << 24, lingerMs: 5, syncRateBytesPerSec: 0, verify: { everyMs: 0, rateBytesPerSec: 0 },
    proofEveryMs: 1000, rotateEveryMs: 1000, slowAck: { p99Ms: 1, maxMs: 1 }, existingNbdServers: {},
  }
  const agent = { host: '127.0.0.1', port: 1, tls: { certificatePem: '', privateKeyPem: '', authorityPem: '' } }
  const vpg = new Vpg({
    definition: { name: 'shop', vmIds: [101, 102], checkpointEveryMs: 5000, ...(generation === undefined ? {} : { generation }) }, settings, agent, log: silentLogger,
    onEvent: (event) => {
      events.push(event)
      wake()
    },
  })
  const until = async (done: (events: readonly VpgEvent[]) => boolean): Promise<void> => {
    while (!done(events)) await new Promise<void>((resolve) => (wake = resolve))
  }
  return { vpg, until }
}
const fencedVms = (events: readonly VpgEvent[]): number => events.filter(({ kind, level }) => kind === 'vm-fenced' && level === 'error').length

test('a fenced group is fenced as a whole after a restart, says so with what to do, cuts nothing, and ends with its deletion', async () => {
  await writeFile(fencePath(), JSON.stringify({ format: 1, generation: 2, why: 'taken over', hint: 'Decide.', sinceUnixMs: 1 }))
  const { vpg, until } = group()
  vpg.start()
  await until((events) => fencedVms(events) === 2)
  expect(vpgStatus(vpg, 5)).toMatchObject({ state: 'fenced', reason: 'taken over. Decide.', vms: [{ state: 'fenced', reason: 'taken over. Decide.' }, { state: 'fenced' }] })
  await expect(vpg.tag('x')).rejects.toMatchObject({ code: 'CONFLICT', message: expect.stringContaining('taken over. Decide.') })
  expect(() => vpg.forceSync()).toThrow(expect.objectContaining({ code: 'CONFLICT' }))
  await vpg.stop(true)
  await access(fencePath())
  const again = group()
  again.vpg.start()
  await again.until((events) => fencedVms(events) === 2)
  await again.vpg.stop(false)
  await expect(access(fencePath())).rejects.toMatchObject({ code: 'ENOENT' })
})

test('a group that this site got back in the generation of the fence, or a later one, is not held by it', async () => {
  await writeFile(fencePath(), JSON.stringify({ format: 1, generation: 2, why: 'taken over', hint: 'Decide.', sinceUnixMs: 1 }))
  const { vpg } = group(2)
  vpg.start()
  const untilMs = performance.now() + 30_000
  while (vpg.vms.some(({ state }) => state.why !== 'the VM does not run')) {
    expect(performance.now()).toBeLessThan(untilMs)
    await new Promise((resolve) => setTimeout(resolve, 10))
  }
  expect(vpg.vms.map(({ state }) => state.is)).toEqual(['detached', 'detached'])
  await vpg.stop(true)
})
