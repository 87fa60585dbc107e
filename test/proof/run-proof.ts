import { randomInt } from 'node:crypto'
import { WriteHistory } from '../../agent/proof/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import { lastingLeaksOf, makeTempDir } from '../lab/index.ts'
import { Random } from '../kit/random.ts'
import { Cutter } from './cutter.ts'
import { disturb } from './disturbance.ts'
import { Inspector } from './inspector.ts'
import { Load, WRITER_COUNT } from './load.ts'
import { Rig, REGION_SECTORS, VPG } from './rig.ts'
import { RpoWatch } from './rpo-watch.ts'

const REOPENED = 10

export type ProofOptions = {
  checkpoints: number
  seed: number
  writesPerSec: number
  /** On how many nodes of the protected cluster the VMs run. */
  nodes: 1 | 2
  /** Mean time between two requests for a tagged checkpoint. */
  meanPauseMs: number
  /** The newest valid checkpoint may never be older. */
  rpoLimitMs: number
  /** So many times, evenly spread, a daemon is killed or stopped (disturbance.ts). The RPO is then shown and not judged. */
  disturbances: number
  say: (line: string) => void
  /** Ends the run early, with ABORTED and everything cleaned up. */
  signal: AbortSignal
}

export type ProofResult = {
  ok: boolean
  checkpoints: number
  violations: number
  nodes: number
  /** Cuts that were begun and given up, or refused for the moment: no violation while the RPO holds. */
  abandoned: number
  seed: number
  /** Checkpoints whose moment was known from both sides, see CutBracket. */
  bracketed: number
  /** Earlier checkpoints that were opened a second time at the end, and judged again. */
  reopened: number
  disturbances: number
  tornUnderWay: number
  writes: number
  writtenMiB: number
  maxRpoMs: number
  rpoHeld: boolean
  slowestWriteMs: number
  seconds: number
}

/** What a run leaves for an examination of its files, before it is all removed: both daemons have been stopped. */
export type ProofRemains = { rig: Rig; history: WriteHistory; inspector: Inspector }

/**
 * The write-order proof on the real thing: two VMs in both shapes with two disks each, writers over all of them, both daemons, checkpoints at
 * random moments, each opened in the agent and judged. The load begins before the initial sync and goes on until the last checkpoint is judged.
 *
 * How much it takes, from plugins changed on purpose (few runs, two busy cores): each VM naming its newest record when the request to cut reaches
 * its worker, instead of asking the shared counter: 2 of 300 checkpoints were not closed, in earlier forms of the load at least 4 of 600. At such a rate
 * 200 checkpoints miss that fault about one time in four, 1000 hardly ever. A marker that names one record too few: 19 of 40. Batches stamped
 * a turn of the event loop after their acknowledgement: none of 300; that window is too short for these writers.
 *
 * The seed repeats what the writers choose, not how the processes interleave: a violation need not come again with the same seed.
 * @param afterwards called with the files still there
 */
export const runProof = async (options: ProofOptions, afterwards?: (remains: ProofRemains) => Promise<void>): Promise<ProofResult> => {
  const startedAtMs = performance.now()
  await using dir = makeTempDir()
  const result = await run(dir.path, options, afterwards)
  const left = await lastingLeaksOf(dir.path)
  if (left.length > 0) throw new CdpError('INTERNAL', `something was left behind: ${left.join('; ')}`)
  return { ...result, seconds: Math.round((performance.now() - startedAtMs) / 1000) }
}

const run = async (rootDir: string, options: ProofOptions, afterwards?: (remains: ProofRemains) => Promise<void>): Promise<ProofResult> => {
  const { checkpoints, seed, say, signal, nodes } = options
  const startedAtMs = performance.now()
  const sinceStart = (): string => `${((performance.now() - startedAtMs) / 1000).toFixed(1)} s`
  await using rig = await Rig.start(rootDir, nodes)
  const { sites, disks } = rig
  say(`${sinceStart()}: two VMs on ${nodes === 1 ? 'one node' : 'two nodes'} and both sites are up, seed ${seed}`)
  const history = new WriteHistory({ runId: randomInt(1, 2 ** 32), writerCount: WRITER_COUNT, sectorsOfDisks: disks.map(() => REGION_SECTORS) })
  await using load = await Load.start({ history, disks, seed, writesPerSec: options.writesPerSec })
  await sites.createVpg(VPG, [...rig.vmIds], 1000)
  await sites.untilProtected(VPG, 60_000)
  say(`${sinceStart()}: protected under load, ${history.count} writes so far`)

  await using rpo = RpoWatch.start(sites, VPG, options.disturbances > 0)
  await using cutter = Cutter.start({ plugins: rig.plugins, history, load, seed: seed + 1000, meanPauseMs: options.meanPauseMs, mayFail: options.disturbances > 0 })
  const inspector = new Inspector({ sites, history, disks, brackets: cutter.brackets, say })
  const random = new Random(seed + 2000)
  let disturbances = 0
  let saidAtMs = performance.now()
  await inspector.run(checkpoints, 60_000, async () => {
    if (signal.aborted) throw new CdpError('ABORTED', 'the proof was ended early')
    load.check()
    if (disturbances < options.disturbances && inspector.totals.checkpoints >= (checkpoints * (disturbances + 0.5)) / options.disturbances) {
      say(`${sinceStart()}: ${await disturb(rig, load, disturbances++, random)}, and protected again`)
    }
    if (performance.now() - saidAtMs < 2000) return
    saidAtMs = performance.now()
    const { totals } = inspector
    say(`${sinceStart()}: ${totals.checkpoints} checkpoints judged, ${totals.violations} violations, ${history.count} writes, ${rpo.describe()}`)
  })
  await cutter.stop()
  await rpo.stop()
  const reopened = await inspector.reopen(Math.min(REOPENED, checkpoints), random)
  await load.stop()
  const status = (await sites.pluginStatus()).vpgs.find(({ name }) => name === VPG)
  if (status === undefined) throw new CdpError('INTERNAL', 'the group is gone')
  const { totals } = inspector
  const rpoHeld = options.disturbances > 0 || rpo.maxMs <= options.rpoLimitMs
  const result: ProofResult = {
    ok: totals.violations === 0 && rpoHeld && totals.checkpoints >= checkpoints && totals.bracketed > 0,
    checkpoints: totals.checkpoints, violations: totals.violations, nodes, abandoned: Math.max(status.abandonedCuts, cutter.refused), seed,
    bracketed: totals.bracketed, reopened, disturbances, tornUnderWay: totals.tornUnderWay, writes: history.count, writtenMiB: Math.round(load.figures.writtenBytes / (1 << 20)),
    maxRpoMs: Math.round(rpo.maxMs), rpoHeld, slowestWriteMs: Math.round(load.figures.slowestMs), seconds: 0,
  }
  if (afterwards !== undefined) {
    for (const plugin of rig.plugins) await plugin.stop()
    await sites.agent.stop()
    await afterwards({ rig, history, inspector })
  }
  return result
}
