import { agentApi } from '../../core/api/index.ts'
import { CdpError } from '../../core/errors/index.ts'
import { PointImages } from '../e2e/point-images.ts'
import { GapMeters, KEYS, VMS, VPG } from '../e2e/two-sites.ts'
import { durableRecord } from '../lab/index.ts'
import { HIT, type FaultRig } from './fault-rig.ts'
import { hit } from './hits.ts'
import { nameOf, type Cell } from './matrix.ts'
import { enterPhase } from './phases.ts'

const RECOVERY_MS = 180_000
/** The guest goes on within this, whatever happens to us; and what the machine makes any guest wait comes on top. */
const LONGEST_GAP_MS = 2_000
/** How often a write waits for its turn on a busy machine: in QEMU as any guest's, then in the capture worker, then in QEMU again. */
const TURNS = 3
/** Between two writes that are measured: a guest without hardware support should do something else as well. */
const METER_PAUSE_US = 20_000
const CONTROL_PAUSE_US = 100_000

export type CellResult = { longestGapMs: number; /** Of a guest that is not protected, in the same time. */ controlGapMs: number; seconds: number }

/**
 * One cell: brings about its phase, its fault in it, and the end of that; then everything must be as if nothing had happened.
 * @throws CdpError INTERNAL saying what is not
 */
export const runCell = async (rig: FaultRig, cell: Cell): Promise<CellResult> => {
  const beganMs = performance.now()
  if (cell.phase === 'initial') await rig.forget()
  else if (!(await rig.isProtected())) await rig.all.protect()
  // What is promoted away is not there to be compared: the older checkpoint is one that stays.
  if (cell.phase === 'promotion') rig.known = undefined
  else if (cell.phase !== 'initial') await learn(rig)
  // A guest that is killed or stopped itself waits for itself; what it costs the other one counts.
  const meters = new GapMeters(rig.all.guests.filter(({ vm }) => !(cell.component === 'QEMU' && vm.vmId === HIT)), METER_PAUSE_US)
  const control = new GapMeters([rig.control], CONTROL_PAUSE_US)
  await Promise.all([meters.start(), control.start()])
  await using phase = await enterPhase(rig, cell.phase)
  if (cell.phase === 'promotion') await learn(rig)
  await hit(rig, cell)
  await phase[Symbol.asyncDispose]()
  await rig.all.sites.untilProtected(VPG, RECOVERY_MS)
  const { writes } = await meters.look()
  const gap = await meters.untilWrites(writes, 10)
  const { longestGapMs: controlGapMs } = await control.look()
  await Promise.all([meters.stop(), control.stop()])
  demand(gap.failed === 0, `${gap.failed} writes of a guest failed`)
  demand(gap.longestGapMs < LONGEST_GAP_MS + TURNS * controlGapMs, `a guest waited ${gap.longestGapMs} ms; one that is not protected ${controlGapMs} ms`)
  const { known } = rig
  await recovers(rig, `after ${nameOf(cell)}`)
  const differences = await rig.all.differences('at rest')
  demand(differences.length === 0, `the replica differs: ${differences.join(', ')}`)
  // A promotion that goes on may reach it: then it was recovered for the last time.
  if (known !== undefined && !(cell.phase === 'promotion' && (await oldestOf(rig)) > known.atUnixMs)) {
    using again = await PointImages.copy(rig.all.sites, VPG, known.id)
    demand(JSON.stringify(again.digests()) === JSON.stringify(known.digests), 'an older checkpoint has changed')
  }
  return { longestGapMs: gap.longestGapMs, controlGapMs, seconds: Math.round((performance.now() - beganMs) / 1000) }
}

/** When the oldest checkpoint was that can be recovered. */
const oldestOf = async ({ all: { sites } }: FaultRig): Promise<number> => (await sites.agent.api.call(agentApi.showRetention, { params: { name: VPG } })).from?.atUnixMs ?? 0

/** Sees to it that there is a checkpoint whose content is known. */
const learn = async (rig: FaultRig): Promise<void> => {
  if (rig.known !== undefined) return
  const { id, atUnixMs } = await rig.all.tag('known')
  using point = await PointImages.copy(rig.all.sites, VPG, id)
  rig.known = { id, atUnixMs, digests: point.digests() }
}

/**
 * Every disk of a checkpoint of now is whole: ext4, and of each writer and of the chain over both guests a prefix, with all that was durable before.
 * It is the one whose content is known from here on.
 */
const recovers = async (rig: FaultRig, tag: string): Promise<void> => {
  const { chain } = rig
  const durable = await Promise.all(VMS.map(async ({ vmId }) => ({ vmId, least: await durableRecord(rig.all.guest(vmId)), folder: rig.lifeOf(vmId) })))
  const { id, atUnixMs } = await rig.all.tag(tag)
  using point = await PointImages.copy(rig.all.sites, VPG, id)
  const problems = await point.ext4Problems()
  demand(problems.length === 0, `file systems: ${problems.join('; ')}`)
  for (const { vmId, least, folder } of durable) {
    const report = await point.prefix(KEYS.map((key) => ({ vmId, key, folder })))
    demand(report.ok && report.last >= least, `VM ${vmId}: records ${JSON.stringify(report)}, ${least} were durable`)
  }
  if (chain !== undefined) {
    const report = await point.prefix(VMS.map(({ vmId }) => ({ vmId, key: KEYS[0], folder: chain.folder })))
    demand(report.ok && report.last >= chain.durable, `over both guests: records ${JSON.stringify(report)}, ${chain.durable} were durable`)
  }
  rig.known = { id, atUnixMs, digests: point.digests() }
}

const demand = (holds: boolean, otherwise: string): void => {
  if (!holds) throw new CdpError('INTERNAL', otherwise)
}
