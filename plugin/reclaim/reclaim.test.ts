import { mkdtemp, rm } from 'node:fs/promises'
import { afterEach, beforeEach, describe, expect, test } from '@jest/globals'
import { silentLogger } from '../../core/log/index.ts'
import type { DiscardFate } from '../qemu/index.ts'
import { GuestAgent } from './guest-agent.ts'
import { passesDiscards, reclaim } from './reclaim.ts'
import type { ReclaimVm } from './reclaim.ts'
import { ReclaimSchedule, isWithin } from './reclaim-schedule.ts'
import type { ReclaimScheduleOptions } from './reclaim-schedule.ts'
import { serveFakeAgent } from './testing.ts'

let dir = ''
const path = (): string => `${dir}/q`
beforeEach(async () => void (dir = await mkdtemp('/tmp/cdp-')))
afterEach(() => rm(dir, { recursive: true }))

class NotingVm implements ReclaimVm {
  readonly did: string[] = []
  readonly vmId: number
  state = { is: 'streaming' }
  refuse = false

  constructor(vmId = 100) {
    this.vmId = vmId
  }

  async suspend({ owner, forMs }: { owner: string; forMs: number }): Promise<void> {
    this.did.push(`suspend ${owner} ${forMs}`)
    if (this.refuse) throw new Error('a backup runs')
  }

  async resume(owner: string): Promise<boolean> {
    this.did.push(`resume ${owner}`)
    return true
  }
}

describe('a bracket', () => {
  test('suspends, lets the guest trim, and resumes', async () => {
    const vm = new NotingVm()
    await using agent = await serveFakeAgent(path(), (command) => {
      vm.did.push(command)
      return { return: { paths: [{ path: '/', trimmed: 4096, minimum: 0 }, { path: '/data', error: 'EROFS' }, { path: '/x', trimmed: -1 }, null] } }
    }, '{"return": {}}\n{"half')
    expect(await reclaim(vm, agent.path, 1000)).toEqual({ trimmedBytes: 4096, failed: ['/data: EROFS'] })
    expect(vm.did).toEqual(['suspend reclaim 1000', 'guest-fstrim', 'resume reclaim'])
  })

  test('resumes when the guest refuses, falls silent or talks nonsense, and when capture cannot be suspended', async () => {
    for (const [answer, code] of [[{ error: { class: 'GenericError', desc: 'not supported' } }, 'IO'], [undefined, 'TIMEOUT'], [{ return: 'yes' }, 'IO'], [{ x: 1 }, 'IO']] as const) {
      const vm = new NotingVm()
      await using agent = await serveFakeAgent(path(), () => answer)
      await expect(reclaim(vm, agent.path, 150)).rejects.toMatchObject({ code })
      expect(vm.did).toEqual(['suspend reclaim 150', 'resume reclaim'])
    }
    const vm = new NotingVm()
    vm.refuse = true
    await using agent = await serveFakeAgent(path(), () => expect(false).toBe(true) as never)
    await expect(reclaim(vm, agent.path, 100)).rejects.toThrow('a backup runs')
    expect(vm.did.at(-1)).toBe('resume reclaim')
  })

  test('does nothing to a VM whose guest has no agent', async () => {
    const vm = new NotingVm()
    await expect(reclaim(vm, path(), 100)).rejects.toMatchObject({ code: 'IO' })
    expect(vm.did).toEqual([])
  })

  test('an agent that says too much is hung up on', async () => {
    await using fake = await serveFakeAgent(path(), () => ({ return: 'x'.repeat(2 * 1024 * 1024) }))
    using agent = await GuestAgent.connect(fake.path, 5000)
    await expect(agent.execute('guest-info', {}, 5000)).rejects.toMatchObject({ code: 'IO' })
  })
})

test('only disks with discard=on have something to be given back', () => {
  expect(passesDiscards('cores: 2\nscsi0: local:vm-100-disk-0,discard=on,size=32G\n')).toBe(true)
  expect(passesDiscards('virtio1: local:vm-100-disk-0,size=32G,discard=on\n')).toBe(true)
  expect(passesDiscards('scsi0: local:vm-100-disk-0,size=32G\ndescription: discard=on\n')).toBe(false)
  expect(passesDiscards('scsi0: local:vm-100-disk-0,discard=ignore\n[before]\nscsi0: local:vm-100-disk-0,discard=on\n')).toBe(false)
})

test('a window may pass midnight', () => {
  const at = (clock: string): Date => new Date(`2026-03-04T${clock}:00`)
  const holds = (from: string, to: string): string[] => ['01:59', '02:00', '04:59', '05:00', '23:30'].filter((clock) => isWithin({ from, to }, at(clock)))
  expect(holds('02:00', '05:00')).toEqual(['02:00', '04:59'])
  expect(holds('23:00', '02:00')).toEqual(['01:59', '23:30'])
  expect(holds('02:00', '02:00')).toHaveLength(5)
})

describe('the schedule', () => {
  const swallows: DiscardFate = { reachesStorage: false, copied: 'not', version: '10.0.2' }
  let nowMs = 0
  const done: number[] = []
  beforeEach(() => {
    nowMs = new Date('2026-03-04T03:00:00').getTime()
    done.length = 0
  })
  const schedule = (vms: ReclaimVm[], more: Partial<ReclaimScheduleOptions> = {}): ReclaimSchedule => new ReclaimSchedule({
    settings: { everyMs: 7 * 86_400_000, from: '02:00', to: '05:00', maxMs: 1000 }, stateDirectory: dir, vms: () => vms, probe: async () => swallows, wants: async () => true,
    reclaim: async () => ({ trimmedBytes: 1, failed: [] }), onReclaimed: (vmId) => void done.push(vmId), log: silentLogger, now: () => new Date(nowMs), ...more,
  })

  test('each streaming VM once in an interval, in the window, over restarts', async () => {
    const vms = [new NotingVm(1), new NotingVm(2), new NotingVm(3)]
    vms[1].state.is = 'syncing'
    await schedule(vms).look()
    expect(done).toEqual([1, 3])
    vms[1].state.is = 'streaming'
    nowMs += 3 * 3_600_000
    await schedule(vms).look()
    expect(done).toEqual([1, 3])
    nowMs += 22 * 3_600_000
    await schedule(vms).look()
    expect(done).toEqual([1, 3, 2])
    nowMs += 6 * 86_400_000
    await schedule(vms).look()
    expect(done).toEqual([1, 3, 2, 1, 3])
  })

  test('what fails is tried again hours later; a VM that has nothing is left alone', async () => {
    let calls = 0
    const one = schedule([new NotingVm(1)], { reclaim: async () => {
      calls++
      throw new Error('no agent')
    }, settings: { everyMs: 1000, from: '00:00', to: '00:00', maxMs: 1 } })
    await one.look()
    await one.look()
    expect(calls).toBe(1)
    nowMs += 7 * 3_600_000
    await one.look()
    expect(calls).toBe(2)
    // A clock that was stepped back does not put it off for ever.
    nowMs -= 1000 * 86_400_000
    await one.look()
    expect([calls, done]).toEqual([3, []])
    await schedule([new NotingVm(2)], { wants: async () => false, settings: { everyMs: 1000, from: '00:00', to: '00:00', maxMs: 1 } }).look()
    expect(done).toEqual([])
  })

  test('where QEMU forwards discards nothing is done; where it cannot be probed it is', async () => {
    const forwarding = schedule([new NotingVm(1)], { probe: async () => ({ reachesStorage: true, copied: 'discard', version: '12.0.0' }) })
    expect(forwarding.discards.known).toBe(false)
    await forwarding.look()
    expect([forwarding.discards, done]).toEqual([{ known: true, fate: { reachesStorage: true, copied: 'discard', version: '12.0.0' } }, []])
    const blind = schedule([new NotingVm(1)], { probe: () => Promise.reject(new Error('no such program')) })
    await blind.look()
    expect([blind.discards, done]).toEqual([{ known: false, why: 'no such program' }, [1]])
  })
})
