import { mkdir, open } from 'node:fs/promises'
import { setImmediate as turn, setTimeout as sleep } from 'node:timers/promises'
import { afterAll, beforeAll, describe, expect, test } from '@jest/globals'
import { withQmp } from '../../core/qmp/index.ts'
import type { QmpClient } from '../../core/qmp/index.ts'
import { queryBlockState } from '../../plugin/qemu/block-state.ts'
import { attachCapture, detachCapture, discoverDisks, dropRotated, lookAtVm, repairHalfStates, rotateBitmaps } from '../../plugin/qemu/index.ts'
import { Random, testSeed } from '../kit/random.ts'
import { bootGuest, isAlive, makeTempDir } from '../lab/index.ts'
import type { Guest, VmShape } from '../lab/index.ts'
import { startNbdkit } from './nbdkit-target.ts'
import type { NbdkitTarget } from './nbdkit-target.ts'

// The plugin is killed, again and again, while QEMU is busy with a command of ours and a guest writes to two disks at depth 6: QEMU must live, and capture
// must attach again. (With jobs that end by themselves it died in 2 of 22 such deaths.)

const MiB = 1024 * 1024
const KEYS = ['scsi0', 'scsi1']
const CYCLES = process.env['CDP_ALL'] === undefined ? 5 : 100
const shapes: readonly VmShape[] = ['8.4', '9.x']

type Round = { socketPath: string; qmp: <T>(work: (qmp: QmpClient) => Promise<T>) => Promise<T>; waitMs: number; kill: () => Promise<void> }

const attach = ({ qmp, socketPath }: Round): Promise<unknown> => qmp(async (one) => attachCapture(one, await discoverDisks(one), { nbdSocketPath: socketPath, exportNameOf: (key) => key }))
const repair = ({ qmp }: Pick<Round, 'qmp'>): Promise<unknown> => qmp((one) => repairHalfStates(one, { keepBitmaps: true }))

/** What QEMU is told while its target dies. */
const moments: Record<string, (round: Round) => Promise<unknown>> = {
  attach,
  detach: async (round) => {
    await attach(round)
    return repair(round)
  },
  rotate: async (round) => {
    await attach(round)
    return round.qmp(async (qmp) => {
      const disks = await discoverDisks(qmp)
      await rotateBitmaps(qmp, disks)
      await lookAtVm(qmp, { drained: true })
      await dropRotated(qmp, disks)
    })
  },
}

describe.each(shapes)('a real guest in the shape of %s', (shape) => {
  const dir = makeTempDir()
  const random = new Random(testSeed())
  let guest: Guest

  beforeAll(async () => {
    console.log(`seed ${random.seed}`)
    for (const key of KEYS) {
      await using file = await open(`${dir.path}/${key}.raw`, 'w')
      await file.truncate(256 * MiB)
    }
    guest = await bootGuest({ rootDir: dir.path, vmId: 100, shape, disks: KEYS.map((key) => ({ key, path: `${dir.path}/${key}.raw`, format: 'raw' as const })), deadlineMs: 180_000 })
    for (const key of KEYS) {
      for (let writer = 0; writer < 6; writer++) guest.start(`while :; do dd if=/dev/urandom of=/dev/lab/${key} bs=4k count=50 seek=${writer * 5000} oflag=direct conv=notrunc 2>/dev/null; done`)
    }
  }, 200_000)

  afterAll(async () => {
    await guest?.kill()
    await dir[Symbol.asyncDispose]()
  }, 60_000)

  test.each(Object.keys(moments))(`survives ${CYCLES} deaths of its target in the middle of an operation of kind "%s"`, async (moment) => {
    const qmp: Round['qmp'] = (work) => withQmp(guest.vm.qmpPath, { deadlineMs: 20_000 }, work)
    for (let cycle = 0; cycle < CYCLES; cycle++) {
      await using target = await startTarget(dir.path, `${moment}${cycle}`)
      const round: Round = { socketPath: target.socketPath, qmp, waitMs: random.int(0, 80), kill: () => target.kill() }
      const [told] = await Promise.allSettled([moments[moment](round), sleep(round.waitMs).then(round.kill)])
      // What was told may have failed; QEMU may not.
      expect([isAlive(guest.vm.pid), told.status]).toEqual([true, expect.any(String)])
      await repair({ qmp })
    }
    await using target = await startTarget(dir.path, `${moment}-last`)
    await attach({ socketPath: target.socketPath, qmp, waitMs: 0, kill: () => target.kill() })
    await repair({ qmp })
    const { stdout } = await guest.run('dd if=/dev/urandom of=/dev/lab/scsi0 bs=4k count=1 oflag=direct conv=notrunc && echo written', { deadlineMs: 60_000 })
    expect(stdout).toContain('written')
  }, 60_000 + CYCLES * 20_000)

  test('a target that dies after we have looked, before its job is asked to end: the job is cut off, and capture is taken away', async () => {
    await using target = await startTarget(dir.path, 'looked')
    await withQmp(guest.vm.qmpPath, { deadlineMs: 20_000 }, async (qmp) => {
      await attachCapture(qmp, await discoverDisks(qmp), { nbdSocketPath: target.socketPath, exportNameOf: (key) => key })
      const taken = await detachCapture(before(qmp, 'qom-set', async () => {
        await target.kill()
        while (!(await queryBlockState(qmp)).jobs.some(({ failed }) => failed)) await turn()
      }), { keepBitmaps: false })
      expect(taken.jobs).toHaveLength(KEYS.length)
      expect((await queryBlockState(qmp)).jobs).toEqual([])
    })
    expect(isAlive(guest.vm.pid)).toBe(true)
  }, 60_000)
})

/** The first time it is told this, something happens before. */
const before = (qmp: QmpClient, command: string, work: () => Promise<void>): QmpClient => {
  let done = false
  return new Proxy(qmp, {
    get: (of, name) => {
      const value: unknown = Reflect.get(of, name, of)
      if (typeof value !== 'function') return value
      if (name !== 'execute') return value.bind(of) as unknown
      return async (...args: Parameters<QmpClient['execute']>) => {
        if (args[0] === command && !done) {
          done = true
          await work()
        }
        return of.execute(...args)
      }
    },
  })
}

const startTarget = async (dir: string, name: string): Promise<NbdkitTarget> => {
  await mkdir(`${dir}/${name}.d`, { recursive: true })
  for (const key of KEYS) {
    await using file = await open(`${dir}/${name}.d/${key}`, 'w')
    await file.truncate(256 * MiB)
  }
  return startNbdkit(dir, name, ['file', `dir=${dir}/${name}.d`])
}
