import { describe, expect, test } from '@jest/globals'
import { CutLog, GroupClock } from '../../plugin/capture/group-clock.ts'
import { Random, testSeed } from '../kit/random.ts'

type Write = { worker: number; seq: number; submittedAt: number; acknowledgedAt: number }

/** Workers that parse batches, stamp them and acknowledge; a guest that submits what it likes; cuts at any moment, asked late. */
const history = (random: Random): { writes: Write[]; cuts: (number | undefined)[][] } => {
  const clock = new GroupClock()
  const workers = Array.from({ length: random.int(1, 5) }, () => ({ clock: new GroupClock(clock.buffer), log: new CutLog(), lastSeq: 0, arrived: [] as number[] }))
  for (const worker of workers) worker.log.reset(worker.clock.read(), 0)
  const writes: Write[] = []
  const cuts: (number | undefined)[][] = []
  const asks: { worker: number; c: number; cut: number }[] = []
  let now = 0
  for (let step = 0; step < 400; step++) {
    now++
    const at = random.int(0, workers.length)
    const worker = workers[at]
    const what = random.int(0, 10)
    if (what < 5) worker.arrived.push(now)
    else if (what < 8) {
      // One turn of the worker's loop: parse all that arrived, stamp, acknowledge. Cuts of other threads may come before or after the read.
      const batch = worker.arrived.splice(0).map((submittedAt): Write => ({ worker: at, seq: ++worker.lastSeq, submittedAt, acknowledgedAt: Infinity }))
      if (batch.length === 0) continue
      const e = worker.clock.read()
      worker.log.stamp(e, worker.lastSeq)
      now++
      for (const write of batch) write.acknowledgedAt = now
      writes.push(...batch)
    } else if (what < 9) {
      const c = clock.cut()
      cuts.push(Array<number | undefined>(workers.length))
      asks.push(...workers.map((_, index) => ({ worker: index, c, cut: cuts.length - 1 })))
    } else {
      // The question reaches a worker some time after the clock was raised, in order for each worker.
      const index = asks.findIndex((ask) => ask.worker === at)
      if (index >= 0) {
        const [ask] = asks.splice(index, 1)
        cuts[ask.cut][at] = worker.log.namedSeq(ask.c)
      }
    }
  }
  for (const { worker, c, cut } of asks) cuts[cut][worker] = workers[worker].log.namedSeq(c)
  return { writes, cuts }
}

describe('the group cut on one node', () => {
  test('holds, for every A that was acknowledged before B was submitted anywhere in the group: never B without A', () => {
    const seed = testSeed()
    process.stdout.write(`seed ${seed}\n`)
    let checked = 0
    for (let run = 0; run < 150; run++) {
      const { writes, cuts } = history(new Random(seed + run))
      let previous: number[] | undefined
      for (const named of cuts) {
        if (named.some((seq) => seq === undefined)) continue
        const cut = named as number[]
        const inside = (write: Write): boolean => write.seq <= cut[write.worker]
        const newestInside = Math.max(-1, ...writes.filter(inside).map(({ submittedAt }) => submittedAt))
        const violation = writes.find((write) => !inside(write) && write.acknowledgedAt < newestInside)
        if (violation !== undefined) throw new Error(`seed ${seed + run}: ${JSON.stringify({ violation, cut })}`)
        if (previous !== undefined) for (const [worker, seq] of cut.entries()) if (seq < previous[worker]) throw new Error(`seed ${seed + run}: a later cut names less`)
        previous = cut
        checked++
      }
    }
    expect(checked).toBeGreaterThan(1000)
  })

  test('a cut that is asked for too late is not guessed', () => {
    const log = new CutLog()
    log.reset(0, 5)
    for (let e = 0; e <= 100; e++) log.stamp(e, 10 + e)
    expect([log.namedSeq(100), log.namedSeq(99), log.namedSeq(40), log.namedSeq(10)]).toEqual([110, 109, 50, undefined])
    log.reset(101, 200)
    expect([log.namedSeq(100), log.namedSeq(101)]).toEqual([undefined, 200])
  })
})
