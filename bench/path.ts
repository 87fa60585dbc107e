import { CdpError } from '../core/errors/index.ts'
import { figureOf, median, type Bench, type BenchOptions, type Direction, type Figure } from './figure.ts'
import { loads } from './capture.ts'
import { cpuFigures, type CpuSample } from './cpu.ts'
import { measureMemory } from './memory.ts'
import { BUDGET_BYTES, mib } from './rig/budget.ts'
import type { Load } from './rig/fio.ts'
import { PathRig, type PathRound } from './rig/path-rig.ts'
import { measureRpo } from './rpo.ts'

const SIZE_BYTES = 2 * 1024 ** 3
/** Room for a load that the agent cannot follow: its drain is counted instead. */
const ROOMY_BUDGET_BYTES = 3 * 1024 ** 3
const AGAINST = "QEMU's own mirror over TLS into nbdkit file"
/** Share of the rate found that the second look is run at. */
const LOOK_SHARE = 0.95
/** A load at which capture lets go even so is tried again at this share of it. */
const STEP_DOWN = 0.6
const MAX_ATTEMPTS = 4

type Case = { name: string; load: (typeof loads)[string]; unit: string; direction: Direction; ours: (round: PathRound) => number; reference: (fio: PathRound['fio']) => number; cpu: boolean }

/** Operations a second, the drain counted as time of the load. */
const sustainedIops = ({ fio, drainMs }: PathRound, blockBytes: number): number => fio.totalBytes / blockBytes / (fio.seconds + drainMs / 1000)

const cases: Case[] = [
  { name: 'path.randwrite4k.qd1', load: loads['randwrite4k.qd1'], unit: 'us', direction: 'less is better', ours: ({ fio }) => fio.meanUs, reference: ({ meanUs }) => meanUs, cpu: false },
  { name: 'path.randwrite4k.qd32', load: loads['randwrite4k.qd32'], unit: 'IOPS', direction: 'more is better', ours: (round) => sustainedIops(round, 4096), reference: ({ iops }) => iops, cpu: true },
  {
    name: 'path.seqwrite1m', load: loads.seqwrite1m, unit: 'MiB/s', direction: 'more is better', ours: (round) => sustainedIops(round, 2 ** 20),
    reference: ({ bytesPerSec }) => bytesPerSec / 2 ** 20, cpu: true,
  },
]

const CPU_NAMES = ['cpu.plugin', 'cpu.agent']
const RPO_NAMES = ['rpo.p50', 'rpo.p99', 'lag.p99']
/** Half of this rate is what checkpoints are measured at. */
const RATE_NAME = 'path.randwrite4k.qd32'
const MEMORY_NAME = 'memory.plugin.peak'

/** One figure of the whole path: rounds of the reference and of ours in turn, then a second look at the rate found, with default memory. */
const measure = async (rig: PathRig, one: Case, baseVm: number, { quick, say }: BenchOptions): Promise<{ figure: Figure; cpu: CpuSample[]; rate: number }> => {
  const rounds: { ours: number; reference: number }[] = []
  const cpu: CpuSample[] = []
  const rates: number[] = []
  const drains: number[] = []
  let load: Load = { ...one.load, seconds: quick ? 2 : 5 }
  let vm = baseVm
  await rig.capture(String(vm), ROOMY_BUDGET_BYTES)
  while (rounds.length < (quick ? 1 : 5)) {
    const reference = await rig.reference({ ...one.load, seconds: load.seconds })
    const ours = await rig.ours(String(vm), load)
    if (ours.letGo) {
      say(`${one.name}: capture let go at ${ours.fio.iops.toFixed(0)} IOPS, again with less: ${rig.plugin.news(String(vm)).letGo.at(-1)}`)
      await rig.plugin.release(String(vm))
      if (vm - baseVm === MAX_ATTEMPTS) throw new CdpError('CONFLICT', `${one.name}: capture let go at every rate that was tried`)
      load = { ...load, rateIops: (load.rateIops ?? ours.fio.iops) * STEP_DOWN }
      await rig.capture(String(++vm), ROOMY_BUDGET_BYTES)
      continue
    }
    rounds.push({ ours: one.ours(ours), reference: one.reference(reference.fio) })
    rates.push(sustainedIops(ours, one.load.blockBytes))
    drains.push(ours.drainMs)
    cpu.push({ load: one.name, capturedBytes: ours.fio.totalBytes, ...ours.cpu, referenceBytes: reference.fio.totalBytes, nbdkitSeconds: reference.nbdkitSeconds })
    say(
      `${one.name} round ${rounds.length}: ours ${one.ours(ours).toFixed(1)} ${one.unit}, QEMU over TLS into nbdkit ${one.reference(reference.fio).toFixed(1)}; `
      + `fio ${ours.fio.iops.toFixed(0)} IOPS, drained in ${ours.drainMs.toFixed(0)} ms, settled in ${ours.settleMs.toFixed(0)} ms, held at most ${mib(ours.peakBytes)} MiB`,
    )
  }
  await rig.plugin.release(String(vm))
  const rate = median(rates)
  const look = await secondLook(rig, one, String(baseVm + MAX_ATTEMPTS + 1), rate, quick)
  const limit = load.rateIops === undefined ? '' : `load limited to ${load.rateIops.toFixed(0)} IOPS, since capture let go without; `
  const note = `${limit}drain of ${median(drains).toFixed(0)} ms after ${load.seconds} s counted; ${look}`
  return { figure: { ...figureOf(one.name, one.unit, one.direction, rounds, AGAINST), ...(quick ? { reduced: true } : {}), note }, cpu, rate }
}

/** The rate found, nearly, with the memory that capture has by default: it may neither reach its budget nor let go. */
const secondLook = async (rig: PathRig, one: Case, vm: string, rate: number, quick: boolean): Promise<string> => {
  await rig.capture(vm, BUDGET_BYTES)
  const round = await rig.ours(vm, { ...one.load, seconds: quick ? 1 : 5, rateIops: Math.max(1, rate * LOOK_SHARE) })
  await rig.plugin.release(vm)
  const at = `at ${Math.round(LOOK_SHARE * 100)} % of it with ${mib(BUDGET_BYTES)} MiB`
  return round.letGo ? `NOT sustained ${at}: ${rig.plugin.news(vm).letGo.at(-1)}` : `${at}: at most ${mib(round.peakBytes)} MiB held`
}

const run = async (options: BenchOptions): Promise<Figure[]> => {
  const { wants, quick, say, scratchDirectory: socketDirectory, diskDirectory, signal } = options
  const figures: Figure[] = []
  const cpu: CpuSample[] = []
  const wantsCpu = CPU_NAMES.some(wants)
  const wantsRpo = RPO_NAMES.some(wants)
  let maxIops = 0
  const steps: ((rig: PathRig) => Promise<void>)[] = cases.flatMap((one, index) => {
    const isNeeded = (one.cpu && wantsCpu) || (one.name === RATE_NAME && wantsRpo)
    if (!wants(one.name) && !isNeeded) return []
    return async (rig: PathRig) => {
      const measured = await measure(rig, one, 110 + index * 10, options)
      if (wants(one.name)) figures.push(measured.figure)
      if (one.cpu) cpu.push(...measured.cpu)
      if (one.name === RATE_NAME) maxIops = measured.rate
    }
  })
  if (wantsRpo) steps.push(async (rig) => void figures.push(...(await measureRpo(rig, { quick, say, rateIops: maxIops / 2 })).filter(({ name }) => wants(name))))
  if (wants(MEMORY_NAME)) steps.push(async (rig) => void figures.push(await measureMemory(rig, { quick, say })))
  // Journals only grow here: in the long form each step has an agent of its own, and they are gone with it.
  for (const group of quick ? [steps] : steps.map((step) => [step])) {
    await using rig = await PathRig.start({ socketDirectory, diskDirectory, sizeBytes: SIZE_BYTES, signal })
    for (const step of group) await step(rig)
  }
  if (wantsCpu) figures.push(...cpuFigures(cpu, quick).filter(({ name }) => wants(name)))
  return figures
}

export const pathBench: Bench = { names: [...cases.map(({ name }) => name), ...RPO_NAMES, ...CPU_NAMES, MEMORY_NAME], run }
